# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The grid is true to the slices' positions, or refused by the place where it is not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from bundles.common.errors import RefusedScan
from bundles.common.scans.dicom_headers import read_headers
from bundles.common.scans.slice_grid import grid_affine, sort_slices

from .dicom_files import write_enhanced, write_series

CORONAL = (1, 0, 0, 0, 0, -1)
OBLIQUE = (0.8, 0.36, 0.48, -0.6, 0.48, 0.64)  # two unit vectors at right angles


def images(slices: int = 9, columns: int = 7) -> np.ndarray:
    return np.zeros((columns, 6, slices), dtype=np.int16)


def affine_of(folder: Path) -> np.ndarray:
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    return grid_affine(sort_slices(read_headers(files)))


def refusal(folder: Path) -> str:
    with pytest.raises(RefusedScan) as refused:
        affine_of(folder)
    return str(refused.value)


def test_positions_rounded_to_a_tenth_of_a_mm_pass(tmp_path):
    """0.625 mm slices at 0.6, 1.2 (1.25), 1.9 (1.875), ...: the gaps are 0.6 or 0.7, but no slice is off by 0.1."""
    offsets = [round(0.625 * z, 1) for z in range(33)]
    write_series(tmp_path, images(33), offsets=offsets)
    np.testing.assert_allclose(affine_of(tmp_path)[:3, 2], [0, 0, 0.625], rtol=0, atol=1e-12)


def test_too_few_slices_are_refused(tmp_path):
    write_series(tmp_path, images(2))
    assert "2 slices" in refusal(tmp_path) and "3 or more" in refusal(tmp_path)


def test_three_slices_are_enough_to_judge_their_gaps(tmp_path):
    write_series(tmp_path / "even", images(3))
    np.testing.assert_allclose(affine_of(tmp_path / "even")[:3, 2], [0, 0, 2.5], rtol=0, atol=1e-12)
    write_series(tmp_path / "uneven", images(3), offsets=[0, 2.5, 6])
    assert "unevenly spaced: 2.50 mm" in refusal(tmp_path / "uneven")


def test_a_missing_slice_is_refused_by_its_place(tmp_path):
    files = write_series(tmp_path, images(12))
    os.remove(files[4])
    message = refusal(tmp_path)
    assert "lacks 1 of its slices, the first 1 between" in message
    assert f"{files[3].name} at (-120.25, -98.5, 318.25)" in message
    assert f"{files[5].name} at (-120.25, -98.5, 323.25)" in message
    assert "5.00 mm" in message and "2.50 mm" in message


def test_several_missing_slices_are_counted(tmp_path):
    files = write_series(tmp_path, images(14))
    for z in (3, 4, 9):
        os.remove(files[z])
    message = refusal(tmp_path)
    assert "lacks 3 of its slices, the first 2 between" in message and "7.50 mm" in message
    assert files[2].name in message and files[5].name in message


def test_uneven_gaps_are_refused_by_their_places(tmp_path):
    offsets = [2.5 * z for z in range(5)] + [10.8 + 2.5 * z for z in range(4)]
    files = write_series(tmp_path, images(), offsets=offsets)
    message = refusal(tmp_path)
    assert f"0.80 mm between {files[4].name} at (-120.25, -98.5, 320.75)" in message
    assert f"{files[5].name} at (-120.25, -98.5, 321.55), but 2.50 mm" in message
    assert "dcm2niix" in message


def test_a_spacing_that_grows_slowly_is_refused(tmp_path):
    """No gap is far from the usual one, but the slices in the middle lie 1 mm off an even grid."""
    write_series(tmp_path, images(20), offsets=[2.5 * z + 0.01 * z**2 for z in range(20)])
    message = refusal(tmp_path)
    assert "unevenly spaced: 2.51 mm" in message and "2.87 mm" in message


def test_slices_that_share_a_position_are_refused(tmp_path):
    uid = generate_uid()
    first = write_series(tmp_path / "1", images(), SeriesInstanceUID=uid, AcquisitionNumber=1)
    write_series(tmp_path / "2", images(), SeriesInstanceUID=uid, AcquisitionNumber=2)
    message = refusal(tmp_path)
    assert "share a position" in message and "9 such pairs" in message and first[0].name in message
    assert "(-120.25, -98.5, 310.75)" in message and "several acquisitions" in message


@pytest.mark.parametrize("degrees", [0.5, 1.5, -15.0])
def test_a_tilted_gantry_is_refused_with_its_angle(tmp_path, degrees):
    write_series(tmp_path, images(), orientation=OBLIQUE, tilt=degrees)
    message = refusal(tmp_path)
    assert f"{abs(degrees):.1f} degrees" in message and "dcm2niix" in message


def test_a_slice_beside_the_line_of_the_others_is_refused(tmp_path):
    def push(dataset, z):
        if z == 4:
            dataset.ImagePositionPatient[0] += 3

    files = write_series(tmp_path, images(), edit=push)
    message = refusal(tmp_path)
    assert f"{files[4].name} at (-117.25, -98.5, 320.75)" in message and "3.00 mm off" in message


def test_slices_of_different_spacing_are_refused(tmp_path):
    def zoom(dataset, z):
        if z > 4:
            dataset.PixelSpacing = [0.5, 0.8]

    write_series(tmp_path, images(), edit=zoom, seed=None)
    message = refusal(tmp_path)
    assert "image0005.dcm differs from image0000.dcm in pixel spacing (0.8 x 0.5 mm and 0.75 x 0.5 mm)" in message


@pytest.mark.parametrize(
    ("columns", "other", "words"),
    [
        (7, {"orientation": CORONAL}, "in orientation ((1, 0, 0, 0, 0, -1) and (1, 0, 0, 0, 1, 0))"),
        (9, {}, "in size ((9, 6) and (7, 6) voxels)"),
    ],
)
def test_slices_of_different_size_or_orientation_are_refused(tmp_path, columns, other, words):
    write_series(tmp_path / "1", images())
    write_series(tmp_path / "2", images(4, columns), **other)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("degrees", [0.0, 0.05])
def test_the_last_slice_lies_where_its_file_says(tmp_path, degrees):
    """A lean too small to refuse is kept in the affine, and no error adds up from slice to slice."""
    files = write_series(tmp_path, images(101), orientation=OBLIQUE, tilt=degrees)
    right, back, up = (float(number) for number in pydicom.dcmread(files[-1]).ImagePositionPatient)
    np.testing.assert_allclose(affine_of(tmp_path) @ [0, 0, 100, 1], [-right, -back, up, 1], rtol=0, atol=1e-9)


def test_an_enhanced_image_with_a_missing_frame_is_refused(tmp_path):
    write_enhanced(
        tmp_path / "volume.dcm",
        images(10),
        slope=[1] * 10,
        intercept=[0] * 10,
        order=[0, 1, 2, 4, 5, 6, 7, 8, 9],
    )
    assert "lacks 1 of its slices" in refusal(tmp_path)
    assert "volume.dcm frame 3 at" in refusal(tmp_path)
