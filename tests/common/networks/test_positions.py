# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Positions are those of the affine, and a map of windows is that of the whole scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bundles.common.networks.positions import position_map, positions


def oblique():
    """Voxels of 2 x 3 x 4 mm, turned by 30 degrees about z."""
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.5236), -np.sin(0.5236)], [np.sin(0.5236), np.cos(0.5236)]]
    affine = turn @ affine
    affine[:3, 3] = [-100.5, 20.25, 300.0]
    return affine


def test_positions_are_the_affine_applied_to_every_voxel():
    affine = np.stack([np.eye(4), oblique()])
    got = positions(torch.from_numpy(affine), (3, 4, 5))
    assert got.dtype == torch.float32 and got.shape == (2, 3, 3, 4, 5)
    for b in range(2):
        for voxel in [(0, 0, 0), (2, 3, 4), (1, 0, 3)]:
            expected = (affine[b] @ [*voxel, 1])[:3]
            assert got[b, :, voxel[0], voxel[1], voxel[2]].tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_map_of_overlapping_windows_is_that_of_the_whole_scan():
    true = positions(torch.from_numpy(oblique())[None], (20, 17, 9))[0]
    torch.testing.assert_close(position_map(torch.clone, true, roi_size=(8, 8, 4)), true, atol=0.01, rtol=1e-4)
    small = true[:, :5, :6, :3]
    torch.testing.assert_close(position_map(torch.clone, small, roi_size=(8, 8, 4)), small, atol=0.01, rtol=1e-4)


def test_windows_overlap_by_a_quarter_and_are_blended_and_as_many_at_a_time_as_asked():
    sizes = []

    def number_of_the_call(windows):
        sizes.append(len(windows))
        return torch.full_like(windows, len(sizes))

    image = torch.zeros(3, 20, 8, 8)
    found = position_map(number_of_the_call, image, roi_size=(8, 8, 8))[0, :, 4, 4].tolist()
    assert sizes == [1, 1, 1]  # windows from 0, 6 and 12
    assert found[:6] == pytest.approx([1.0] * 6) and found[8:12] == pytest.approx([2.0] * 4)
    assert 1 < found[6] < 1.4 and 1.6 < found[7] < 2  # the window counts more whose middle is nearer
    position_map(number_of_the_call, image, roi_size=(8, 8, 8), sw_batch_size=2)
    assert sizes[3:] == [2, 1]
