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


def write_mask(folder, shape=(7, 6, 5), affine=AFFINE, source="ct1.nii.gz"):
    meta = {"filename_or_obj": str(folder / source)}
    item = {"pred": MetaTensor(torch.ones((1, *shape), dtype=torch.uint8), affine=affine, meta=meta)}
    SaveImaged("pred", output_dir=folder, output_postfix="seg", separate_folder=False, writer=AtomicNibabelWriter)(item)
    return nib.load(folder / source.replace(".nii", "_seg.nii"))


def write_scan(folder, **changed):
    image = nib.Nifti1Image(np.zeros((7, 6, 5), np.int16), AFFINE)
    other = AFFINE.copy()
    other[:3, 3] += 30
    image.set_sform(AFFINE, code=4)
    image.set_qform(other, code=2)
    image.header.set_xyzt_units(changed.get("unit", "mm"), "sec")
    nib.save(image, folder / "ct1.nii.gz")
    return nib.load(folder / "ct1.nii.gz")


def test_a_mask_on_the_grid_of_its_scan_carries_both_forms(tmp_path):
    scan = write_scan(tmp_path)
    mask = write_mask(tmp_path)
    for form in ("get_sform", "get_qform"):
        expected, actual = getattr(scan, form)(coded=True), getattr(mask, form)(coded=True)
        np.testing.assert_array_equal(actual[0], expected[0])
        assert actual[1] == expected[1]
    assert mask.header.get_xyzt_units() == ("mm", "sec")


def test_a_mask_of_a_scan_in_metres_is_in_metres(tmp_path):
    affine = np.diag([2.0, 2, 3, 1]) + np.eye(4, k=3) * 40
    image = nib.Nifti1Image(np.zeros((7, 6, 5), np.int16), np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "ct1.nii.gz")
    mask = write_mask(tmp_path, affine=affine)  # loaded scans are in mm
    np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / "ct1.nii.gz").affine)
    assert mask.header.get_xyzt_units()[0] == "meter"


def test_an_image_on_another_grid_or_without_its_scan_carries_its_own(tmp_path):
    write_scan(tmp_path)
    half = AFFINE.copy()
    half[0, 3] += 0.1
    for changed in ({"affine": half}, {"shape": (7, 6, 4)}):
        mask = write_mask(tmp_path, **changed)
        assert (mask.header["qform_code"], mask.header["sform_code"]) == (1, 1)
        np.testing.assert_allclose(mask.get_sform(), changed.get("affine", AFFINE), atol=1e-4)
        assert mask.header["qoffset_x"] == pytest.approx(mask.header["srow_x"][3])
    assert write_mask(tmp_path, source="gone.nii.gz").header["qform_code"] == 1


def test_a_mask_of_one_slice_has_three_axes(tmp_path):
    assert write_mask(tmp_path, shape=(7, 6, 1)).shape == (7, 6, 1)
    assert write_mask(tmp_path, shape=(1, 1, 1)).shape == (1, 1, 1)
