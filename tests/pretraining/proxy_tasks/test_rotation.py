# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every crop is turned as numpy.rot90 turns it, by the turns that are its label."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from bundles.pretraining.proxy_tasks.rotation import draw_turns, plane_axes, rotate


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("plane", "axes", "shape"),
    [
        ("axial", (0, 1), (4, 4, 4)),
        ("axial", (0, 1), (5, 5, 3)),
        ("official", (1, 2), (4, 4, 4)),
        ("official", (1, 2), (3, 5, 5)),
    ],
)
def test_each_crop_is_turned_as_numpy_turns_it(plane, axes, shape):
    crops = torch.rand(8, 2, *shape)
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    turned = rotate(crops, turns, plane=plane)
    for crop, quarter, got in zip(crops.numpy(), turns.tolist(), turned.numpy(), strict=True):
        assert np.array_equal(got, np.rot90(crop, quarter, axes=(axes[0] + 1, axes[1] + 1)))


def test_the_official_plane_is_what_the_official_code_turns():
    # it calls rot90(x, k, (2, 3)) on (C, R, A, S)
    crop = torch.rand(1, 4, 4, 4)
    assert torch.equal(rotate(crop[None], torch.tensor([3]), plane="official")[0], crop.rot90(3, (2, 3)))


def test_a_quarter_turn_in_the_axial_plane_moves_right_to_anterior():
    crop = torch.zeros(1, 1, 3, 3, 2)
    crop[0, 0, 2, 1, 0] = 1  # the rightmost voxel of RAS
    (place,) = rotate(crop, torch.tensor([1]), plane="axial")[0, 0].nonzero().tolist()
    assert place == [1, 2, 0]


def test_no_turn_is_the_identity_and_crops_are_not_changed_in_place():
    crops = torch.rand(3, 1, 4, 4, 4)
    before = crops.clone()
    assert torch.equal(rotate(crops, torch.tensor([0, 0, 0]), plane="axial"), before)
    rotate(crops, torch.tensor([1, 2, 3]), plane="axial")
    assert torch.equal(crops, before)


def test_turns_are_seeded_and_uniform():
    turns = draw_turns(2000, generators=[generator(1), generator(3)])
    assert turns.dtype == torch.int64
    assert torch.equal(turns, draw_turns(2000, generators=[generator(1), generator(3)]))
    assert not torch.equal(turns, draw_turns(2000, generators=[generator(2), generator(3)]))
    assert torch.equal(turns[2000:], draw_turns(2000, generators=[generator(3)]))  # whoever else is in the batch
    counts = torch.bincount(turns)
    assert len(counts) == 4 and (counts - 1000).abs().max() < 150  # five standard deviations


def test_a_crop_that_is_not_square_in_the_plane_is_refused_with_the_reason():
    crops, turns = torch.rand(1, 1, 4, 4, 2), torch.tensor([1])
    rotate(crops, turns, plane="axial")
    with pytest.raises(
        InputError, match=r"\(4, 4, 2\) voxels is not square in the official plane \(axes 1 and 2\).*roi_size"
    ):
        rotate(crops, turns, plane="official")


def test_an_unknown_plane_is_refused_with_the_known_ones():
    assert plane_axes("axial") == (0, 1)
    with pytest.raises(InputError, match="rotation_plane 'sagittal' is not one of axial, official"):
        plane_axes("sagittal")
