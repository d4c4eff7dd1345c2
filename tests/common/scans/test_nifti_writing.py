# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Masks are saved as MONAI saves them, but never by halves."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import SaveImaged

from bundles.common.scans.nifti_writing import AtomicNibabelWriter

# Oblique, anisotropic, with a flipped axis, as scanners write.
AFFINE = np.array([[-0.8, 0.1, 0.0, 90.0], [0.1, 1.1, 0.0, -120.5], [0.0, 0.0, 3.0, 40.25], [0.0, 0.0, 0.0, 1.0]])


def mask() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 14, size=(7, 6, 5)).astype(np.uint8)


def save(folder, writer, *, ext: str = ".nii.gz", print_log: bool = False) -> None:
    item = {
        "pred": MetaTensor(torch.from_numpy(mask())[None], affine=AFFINE, meta={"filename_or_obj": "in/ct1.nii.gz"})
    }
    SaveImaged(
        keys="pred",
        writer=writer,
        output_dir=folder,
        output_postfix="seg",
        output_ext=ext,
        output_dtype=np.uint8,
        separate_folder=False,
        print_log=print_log,
    )(item)


@pytest.mark.parametrize("writer", [AtomicNibabelWriter, "bundles.common.scans.nifti_writing.AtomicNibabelWriter"])
@pytest.mark.parametrize("ext", [".nii.gz", ".nii"])
def test_saveimaged_keeps_voxels_affine_and_type(tmp_path, writer, ext):
    save(tmp_path, writer, ext=ext)
    assert [p.name for p in tmp_path.iterdir()] == [f"ct1_seg{ext}"]
    image = nib.load(tmp_path / f"ct1_seg{ext}")
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj), mask())
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)


def test_the_file_is_the_one_that_monai_writes(tmp_path):
    save(tmp_path / "atomic", AtomicNibabelWriter)
    save(tmp_path / "plain", NibabelWriter)
    name = "ct1_seg.nii.gz"
    assert (tmp_path / "atomic" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    begun = []

    def disk_full(image, path):
        path.write_bytes(b"half a mask")
        begun.append(path)
        raise OSError("No space left on device")

    monkeypatch.setattr(nib, "save", disk_full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        save(tmp_path, AtomicNibabelWriter)
    assert begun and begun[0].parent == tmp_path and begun[0].name.startswith(".")
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_mask_of_an_earlier_run(tmp_path, monkeypatch):
    save(tmp_path, AtomicNibabelWriter)
    before = (tmp_path / "ct1_seg.nii.gz").read_bytes()
    monkeypatch.setattr(nib.Nifti1Image, "to_filename", lambda self, path: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        save(tmp_path, AtomicNibabelWriter)
    assert (tmp_path / "ct1_seg.nii.gz").read_bytes() == before


def test_the_log_names_the_final_file(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        save(tmp_path, AtomicNibabelWriter, print_log=True)
    assert str(tmp_path / "ct1_seg.nii.gz") in caplog.text
    assert "/." not in caplog.text
