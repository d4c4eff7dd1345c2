# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The small slices of a scan show its body the right way round and in true proportions."""

from __future__ import annotations

import numpy as np
import pytest

from bundles.common.scans.contact_sheet import SIDE, thumbnail

WHOLE = [[0, 0]] * 3


def thirds(picture: np.ndarray) -> list[np.ndarray]:
    assert picture.shape == (SIDE, 3 * SIDE) and picture.dtype == np.uint8
    return [picture[:, place * SIDE : (place + 1) * SIDE] for place in range(3)]


def centre(picture: np.ndarray) -> tuple[float, float]:
    """Row and column of the bright part, from -1 (top, left) to 1."""
    rows, columns = np.nonzero(picture > 127)
    return tuple(float(places.mean() / (SIDE - 1) * 2 - 1) for places in (rows, columns))


def test_right_anterior_superior_is_left_top_top():
    voxels = np.full((32, 32, 32), -1000, np.int16)
    voxels[22:30, 14:18, 14:18] = 500  # at the patient's right
    axial, coronal, _ = thirds(thumbnail(voxels, spacing=(1, 1, 1), box=WHOLE, window=(-500, 500)))
    assert centre(axial)[1] < -0.4 and centre(coronal)[1] < -0.4
    voxels = np.full((32, 32, 32), -1000, np.int16)
    voxels[14:18, 22:30, 14:18] = 500  # anterior
    axial, _, sagittal = thirds(thumbnail(voxels, spacing=(1, 1, 1), box=WHOLE, window=(-500, 500)))
    assert centre(axial)[0] < -0.4 and centre(sagittal)[1] < -0.4
    voxels = np.full((32, 32, 32), -1000, np.int16)
    voxels[14:18, 14:18, 22:30] = 500  # superior
    _, coronal, sagittal = thirds(thumbnail(voxels, spacing=(1, 1, 1), box=WHOLE, window=(-500, 500)))
    assert centre(coronal)[0] < -0.4 and centre(sagittal)[0] < -0.4


@pytest.mark.parametrize("shape", [(40, 40, 10), (400, 400, 100), (512, 512, 128)])
def test_proportions_are_those_in_mm(shape):
    voxels = np.full(shape, 500, np.int16)
    axial, coronal, _ = thirds(thumbnail(voxels, spacing=(1, 0.5, 2), box=WHOLE, window=(-500, 500)))
    assert ((axial > 127).any(1).sum(), (axial > 127).any(0).sum()) == (SIDE // 2, SIDE)
    assert ((coronal > 127).any(1).sum(), (coronal > 127).any(0).sum()) == (SIDE // 2, SIDE)


def test_the_middle_of_the_body_is_shown():
    voxels = np.full((60, 60, 60), -1000, np.int16)
    voxels[5:15, 5:15, 5:15] = 500
    picture = thumbnail(voxels, spacing=(1, 1, 1), box=[[5, 15]] * 3, window=(-500, 500))
    assert (picture == 255).all()


def test_the_window_becomes_black_and_white():
    voxels = np.full((32, 32, 32), 0, np.int16)
    assert np.unique(thumbnail(voxels, spacing=(1, 1, 1), box=WHOLE, window=(-500, 500))).tolist() == [127]


@pytest.mark.parametrize("value", [0, 3e6])
def test_any_values_make_a_picture_without_a_window(value):
    voxels = np.full((12, 8, 9), value, np.float32)
    voxels[:6] += 2
    axial, _, _ = thirds(thumbnail(voxels, spacing=(1, 1, 1), box=WHOLE, window=None))
    assert axial.max() == 255 and axial.min() == 0


def test_thin_things_are_not_skipped():
    voxels = np.full((512, 512, 16), -1000, np.int16)
    voxels[:, 255:257, :] = 3000
    axial, _, _ = thirds(thumbnail(voxels, spacing=(1, 1, 20), box=WHOLE, window=(-1000, 0)))
    assert axial[SIDE // 2 - 2 : SIDE // 2 + 2].max() > 60
