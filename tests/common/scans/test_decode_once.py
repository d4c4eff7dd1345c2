# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Voxels are decoded once and stay what nibabel and MONAI read; a changed file is read again."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import EnsureChannelFirstd, LoadImaged
from nibabel.arrayproxy import ArrayProxy

from bundles.common.errors import InputError
from bundles.common.scans import decode_once
from bundles.common.scans.checks import check_scans
from bundles.common.scans.decode_once import LoadScand, forget_voxels, voxels_once, with_kept_voxels

#: MONAI makes up a pixdim for the fourth axis, and keeps one of size 1.
OF_FOURTH_AXIS = ("dim", "pixdim", "original_pixdim", "original_channel_dim")
AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.8, 0, -70.0], [0, 0, 2.5, 11], [0, 0, 0, 1]])


@pytest.fixture(autouse=True)
def nothing_kept():
    decode_once._kept.clear()
    yield
    decode_once._kept.clear()


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files whose voxels nibabel decodes."""
    names, read = [], ArrayProxy._get_unscaled

    def recorded(proxy, slicer):
        names.append(str(proxy.file_like).rpartition("/")[2])
        return read(proxy, slicer)

    monkeypatch.setattr(ArrayProxy, "_get_unscaled", recorded)
    return names


def write(path, *, dtype=np.int16, slope=None, inter=0.0, shape=(9, 7, 5), seed=0):
    voxels = np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)
    image = nib.Nifti1Image(voxels, AFFINE, dtype=dtype)
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
        image.header.set_data_dtype(dtype)
    nib.save(image, path)
    return path


@pytest.mark.parametrize(
    ("dtype", "slope", "shape"),
    [
        (np.int16, None, (9, 7, 5)),
        (np.uint8, 1.5, (9, 7, 5)),
        (np.int16, 0.1, (9, 7, 5)),
        (np.float32, None, (9, 7, 5)),
        (np.float64, None, (9, 7, 5)),
        (np.int64, None, (9, 7, 5)),
        (np.int16, None, (9, 7, 5, 1)),
        (np.float32, None, (9, 7, 5, 2)),
    ],
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_scans_are_loaded_as_by_monai(tmp_path, dtype, slope, shape, suffix):
    file = write(tmp_path / f"scan{suffix}", dtype=dtype, slope=slope, inter=-7.0, shape=shape)
    first = EnsureChannelFirstd("image")
    expected = first(LoadImaged("image", image_only=True)({"image": file}))["image"]
    for used_again in (True, False):  # the second time from memory
        loaded = first(LoadScand("image", image_only=True, used_again=used_again)({"image": file}))["image"]
        assert loaded.dtype == expected.dtype
        assert loaded.squeeze().stride() == expected.squeeze().stride()
        assert (loaded.as_tensor() == expected.as_tensor()).all()
        assert loaded.meta.keys() == expected.meta.keys()
        for key, value in expected.meta.items():
            if len(shape) > 3 and key in OF_FOURTH_AXIS:
                continue
            np.testing.assert_array_equal(np.asarray(loaded.meta[key]), np.asarray(value), err_msg=key)


def test_channels_in_several_files_are_loaded_as_by_monai(tmp_path):
    files = [write(tmp_path / f"{channel}.nii.gz", seed=channel) for channel in range(3)]
    expected = LoadImaged("image", image_only=True)({"image": files})["image"]
    loaded = LoadScand("image", image_only=True)({"image": files})["image"]
    assert (loaded.as_tensor() == expected.as_tensor()).all() and loaded.shape == (3, 9, 7, 5)


@pytest.mark.parametrize("used_again", [False, True])
def test_channels_whose_grids_differ_by_rounding_are_loaded_on_the_first_grid(tmp_path, used_again):
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    files, voxels = [], np.arange(2 * 9 * 7 * 5, dtype=np.int16).reshape(2, 9, 7, 5)
    for channel, shift in enumerate((0.0, 0.04)):
        files.append(tmp_path / f"{channel}.nii.gz")
        moved = affine.copy()
        moved[0, 3] = shift
        nib.save(nib.Nifti1Image(voxels[channel], moved), files[-1])
    check_scans([{"image": [str(file) for file in files]}], channels=2)
    loaded = LoadScand("image", image_only=True, used_again=used_again)({"image": files})["image"]
    np.testing.assert_array_equal(loaded.numpy(), voxels)
    np.testing.assert_array_equal(loaded.affine.numpy(), affine)
    nib.save(nib.Nifti1Image(voxels[1], np.diag([1.5, 1.5, 3.0, 1.0])), files[1])
    with pytest.raises(Exception, match="affine"):
        LoadScand("image", image_only=True)({"image": files})


def test_a_check_a_loader_and_a_picture_decode_a_file_once(tmp_path, decoded):
    file = write(tmp_path / "scan.nii.gz")
    check_scans([{"image": str(file)}], keep=True)
    LoadScand("image", image_only=True, used_again=True)({"image": file})
    np.asarray(with_kept_voxels(nib.load(file), file).dataobj)
    assert decoded == ["scan.nii.gz"]
    forget_voxels(file)
    assert with_kept_voxels(image := nib.load(file), file) is image
    check_scans([{"image": str(file)}])  # by default, a check keeps nothing
    assert not decode_once._kept


def test_voxels_are_forgotten_once_loaded_unless_they_are_used_again(tmp_path):
    file = write(tmp_path / "scan.nii.gz")
    LoadScand("image", image_only=True, used_again=True)({"image": file})
    assert len(decode_once._kept) == 1
    LoadScand("image", image_only=True)({"image": file})
    assert not decode_once._kept


def test_changing_a_loaded_scan_does_not_change_the_kept_voxels(tmp_path):
    file = write(tmp_path / "scan.nii.gz", dtype=np.float32)
    load = LoadScand("image", image_only=True, used_again=True)
    first = load({"image": file})["image"]
    before = first.as_tensor().clone()
    first += 1
    own = np.asarray(with_kept_voxels(nib.load(file), file).dataobj)
    assert own.flags.writeable and not np.shares_memory(own, voxels_once(nib.load(file), file)[0])
    assert (load({"image": file})["image"].as_tensor() == before).all()


def test_a_changed_file_is_read_again(tmp_path, decoded):
    file = write(tmp_path / "scan.nii.gz", seed=0)
    voxels_once(nib.load(file), file)
    write(file, seed=1, shape=(9, 7, 6))
    assert with_kept_voxels(nib.load(file), file).dataobj.shape == (9, 7, 6)
    raw, slope, inter = voxels_once(nib.load(file), file)
    assert (raw == np.asarray(nib.load(file).dataobj)).all() and (slope, inter) == (1.0, 0.0)


def test_the_memory_is_limited(tmp_path, monkeypatch):
    """A check fills the room and goes on; a loader makes room for the scan in use."""
    monkeypatch.setattr(decode_once, "KEPT_BYTES", 2 * 9 * 7 * 5 * 2)
    files = [write(tmp_path / f"{i}.nii.gz", seed=i) for i in range(4)]

    def kept() -> list[str]:
        return [name.rpartition("/")[2] for name in decode_once._kept]

    check_scans([{"image": str(file)} for file in files], keep=True, workers=1)
    assert kept() == ["0.nii.gz", "1.nii.gz"]
    voxels_once(nib.load(files[0]), files[0], make_room=True)
    voxels_once(nib.load(files[3]), files[3], make_room=True)
    assert kept() == ["0.nii.gz", "3.nii.gz"]
    large = write(tmp_path / "large.nii.gz", shape=(40, 40, 40))
    voxels_once(nib.load(large), large)
    assert kept() == ["0.nii.gz", "3.nii.gz"]


def test_labels_are_whole_numbers_once_loaded(tmp_path):
    voxels = np.zeros((9, 7, 5), np.float32)
    voxels.flat[:3] = 0.9999999, 2.0005, 255
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "label.nii.gz")
    load = LoadScand(["image", "label"], labels="label", image_only=True)
    item = load({"image": tmp_path / "label.nii.gz", "label": tmp_path / "label.nii.gz"})
    assert item["label"].flatten().unique().tolist() == [0, 1, 2, 255]
    assert item["image"].flatten().unique().tolist() == pytest.approx([0, 0.9999999, 2.0005, 255])
    voxels.flat[3] = 1.4
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "label.nii.gz")
    with pytest.raises(InputError, match=r"label\.nii\.gz: holds the label value 1\.4, but label values are whole"):
        load({"image": tmp_path / "label.nii.gz", "label": tmp_path / "label.nii.gz"})
