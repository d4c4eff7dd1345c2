# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""On request, a scan of a tilted gantry becomes upright, and every voxel stays where it was in the patient."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bundles.common.errors import RefusedScan
from bundles.common.scans.dicom_headers import read_headers
from bundles.common.scans.dicom_series import DicomVolume, find_series, read_series
from bundles.common.scans.slice_grid import grid_affine, sort_slices

from ..dicom_files import AXIAL, write_series

OBLIQUE = (0.8, 0.36, 0.48, -0.6, 0.48, 0.64)
SHAPE = (30, 24, 9)
CHANGE = np.array([3.0, -5.0, 2.0])  # HU a mm


def write_ramp(folder: Path, tilt: float, orientation=AXIAL, **options) -> np.ndarray:
    """Write HU that change steadily through the patient: linear interpolation gives them exactly. Returns the affine."""
    files = [str(file) for file in write_series(folder, np.zeros(SHAPE), orientation=orientation, tilt=tilt)]
    affine = grid_affine(sort_slices(read_headers(files)), tilted=True)
    values = 2000 + nib.affines.apply_affine(affine, np.moveaxis(np.indices(SHAPE), 0, -1)) @ CHANGE
    for file in files:
        Path(file).unlink()
    write_series(folder, np.rint(values), orientation=orientation, tilt=tilt, intercept=0, **options)
    return affine


def read(folder: Path, **options) -> DicomVolume:
    (series,), _ = find_series(folder.iterdir())
    return read_series(series, **options)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("tilt", [12.0, -20.5, 1.0])
def test_values_stay_in_their_place(tmp_path, tilt, orientation):
    leaning = write_ramp(tmp_path, tilt, orientation)
    volume = read(tmp_path, straighten_tilt=True)
    assert volume.files == () and volume.voxels.dtype == np.int16
    axes = volume.affine[:3, :3] / nib.affines.voxel_sizes(volume.affine)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-9)
    np.testing.assert_allclose(volume.affine[:3, :2], leaning[:3, :2], rtol=0, atol=1e-9)

    places = np.moveaxis(np.indices(volume.voxels.shape), 0, -1)
    expected = 2000 + nib.affines.apply_affine(volume.affine, places) @ CHANGE
    source = nib.affines.apply_affine(np.linalg.inv(leaning) @ volume.affine, places)
    inside = ((source > -1e-9) & (source < np.array(SHAPE) - 1 + 1e-9)).all(axis=-1)
    assert inside.sum() > 0.9 * (SHAPE[0] - 1) * (SHAPE[1] - 1) * SHAPE[2]
    assert np.abs(volume.voxels - expected)[inside].max() <= 1  # rounded when written, and when moved
    outside = ((source < -1) | (source > np.array(SHAPE))).any(axis=-1)
    assert not outside.any() or (volume.voxels[outside] == volume.voxels.min()).all()


def test_only_on_request_and_only_a_gantry(tmp_path):
    write_ramp(tmp_path / "tilted", 12.0)
    with pytest.raises(RefusedScan, match=r"12\.0 degrees"):
        read(tmp_path / "tilted")
    write_series(tmp_path / "wrong", np.zeros(SHAPE), tilt=50)
    with pytest.raises(RefusedScan, match=r"50\.0 degrees"):
        read(tmp_path / "wrong", straighten_tilt=True)


def test_an_upright_scan_is_left_as_it_is(tmp_path):
    write_ramp(tmp_path, 0.0, OBLIQUE)
    plain, asked = read(tmp_path), read(tmp_path, straighten_tilt=True)
    np.testing.assert_array_equal(asked.voxels, plain.voxels)
    np.testing.assert_array_equal(asked.affine, plain.affine)
    assert asked.files == plain.files
