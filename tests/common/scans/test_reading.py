# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A scan comes with the values that its file means, on the grid of its file; every kind of bad file is refused with the reason."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage, Orientation

from bundles.common.errors import RefusedScan
from bundles.common.scans.dicom_series import find_series
from bundles.common.scans.reading import read_scan, scaled
from bundles.common.scans.search import Candidate

from .dicom_files import write_series
from .test_checks import write

SHAPE = (8, 9, 10)


def candidate(path: Path | str) -> Candidate:
    return Candidate("name", str(path), "nifti", (str(path),))


def reason(path: Path | str) -> str:
    with pytest.raises(RefusedScan) as error:
        read_scan(candidate(path))
    return str(error.value)


def hounsfield(dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(-1024, 3071, SHAPE).astype(dtype)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "IAL"])
def test_values_and_grid_are_those_that_monai_reads_and_orients(tmp_path, axes):
    codes = nib.orientations.axcodes2ornt(axes)
    affine = nib.orientations.inv_ornt_aff(codes, SHAPE) @ np.diag([0.8, 0.9, 2.5, 1])
    file = write(tmp_path / "scan.nii.gz", hounsfield(), affine)
    volume = read_scan(candidate(file))
    assert volume.orientation == "".join(nib.aff2axcodes(nib.load(file).affine))
    loaded = LoadImage(image_only=True, ensure_channel_first=True)(file)
    np.testing.assert_array_equal(volume.voxels, loaded[0].numpy())
    oriented = Orientation(axcodes="RAS", labels=None)(loaded)
    ras = volume.to_ras()
    np.testing.assert_array_equal(ras.voxels, oriented[0].numpy())
    np.testing.assert_allclose(ras.affine, oriented.affine.numpy(), atol=1e-4)
    assert ras.orientation == "RAS"


@pytest.mark.parametrize(
    ("slope", "inter", "dtype"),
    [(1, 0, np.int16), (1, -1024, np.int16), (2, 5, np.int16), (0.5, 0, np.float32), (1, 0.25, np.float32), (100, 0, np.float32)],
)  # fmt: skip
def test_scaling_is_applied_and_whole_values_stay_int16(slope, inter, dtype):
    raw = np.arange(-360, 360, dtype=np.int16).reshape(SHAPE, order="F")
    values = scaled(raw, float(slope), float(inter))
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, (raw.astype(np.float64) * slope + inter).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_whole_values_of_any_type_become_int16(tmp_path, dtype):
    voxels = np.random.default_rng(0).integers(0, 256, SHAPE).astype(dtype)
    volume = read_scan(candidate(write(tmp_path / "scan.nii", voxels)))
    assert volume.voxels.dtype == np.int16
    np.testing.assert_array_equal(volume.voxels, voxels)


def test_values_beyond_int16_stay_float(tmp_path):
    voxels = hounsfield(np.int32)
    voxels[0, 0, 0] = 40000
    volume = read_scan(candidate(write(tmp_path / "scan.nii", voxels)))
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, voxels)


def test_a_fourth_axis_of_one_is_dropped(tmp_path):
    file = write(tmp_path / "scan.nii.gz", hounsfield()[..., None])
    assert read_scan(candidate(file)).voxels.shape == SHAPE


def test_dicom_series_come_in_hu(tmp_path):
    stored = np.random.default_rng(0).integers(0, 2000, (6, 5, 9)).astype(np.int16)
    write_series(tmp_path / "series", stored)
    (series,), _ = find_series(sorted((tmp_path / "series").iterdir()))
    volume = read_scan(Candidate("name", str(tmp_path), "dicom", series.files, series))
    np.testing.assert_array_equal(volume.voxels, stored - 1024)
    assert (volume.voxels.dtype, volume.orientation) == (np.int16, "LPS")


# ---- bad files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_truncated_gzip(tmp_path, share):
    path = Path(
        write(tmp_path / "scan.nii.gz", np.random.default_rng(0).integers(0, 99, (40, 40, 40)).astype(np.int16))
    )
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "cut short" in reason(path)


def test_gzip_that_is_none(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"<html>not found</html>")
    assert "cannot be read" in reason(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("size", [9, 32767])
def test_header_of_a_size_that_the_file_does_not_hold(tmp_path, name, size):
    file = write(
        tmp_path / name,
        hounsfield(),
        dim=[3, 8, 9, 10 * size, 1, 1, 1, 1] if size < 10 else [3, size, size, size, 1, 1, 1, 1],
    )
    assert ("cut short" if size < 10 else "more than any scan") in reason(file)


def test_header_that_is_none(tmp_path):
    file = Path(write(tmp_path / "scan.nii", hounsfield()))
    file.write_bytes(b"\0" * 352 + file.read_bytes()[352:])
    assert "cannot be read" in reason(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers(tmp_path, value):
    voxels = hounsfield(np.float32)
    voxels[1, 2, 3] = value
    assert "1 of 720 voxels that are NaN or infinite" in reason(write(tmp_path / "scan.nii.gz", voxels))


def test_spacing_of_zero(tmp_path):
    file = write(tmp_path / "scan.nii.gz", hounsfield(), pixdim=[1, 0.8, 0, 2.5, 1, 1, 1, 1])
    assert "spacing [0.8" in reason(file)


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 10, 4), (8, 9, 0)])
def test_shapes_that_are_no_volume(tmp_path, shape):
    assert str(shape[-1]) in reason(write(tmp_path / "scan.nii", np.zeros(shape, np.int16)))


def test_colour(tmp_path):
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert "plain numbers" in reason(write(tmp_path / "scan.nii.gz", rgb))


def test_no_permission(tmp_path, monkeypatch):
    file = write(tmp_path / "scan.nii.gz", hounsfield())

    def denied(*_):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(nib, "load", denied)
    assert reason(file) == "cannot be read: Permission denied"


def test_no_memory(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(nib, "load", full)
    assert "--workers" in reason(write(tmp_path / "scan.nii.gz", hounsfield()))


def test_a_file_that_is_gone(tmp_path):
    assert reason(tmp_path / "gone.nii.gz") == "does not exist"


def test_gzip_header_is_checked_against_the_best_that_gzip_can_do(tmp_path):
    """A constant volume is packed a thousandfold and is no damaged file."""
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((128, 128, 128), np.int16), np.eye(4)), path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9))
    assert read_scan(candidate(path)).voxels.shape == (128, 128, 128)
