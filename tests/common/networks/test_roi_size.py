# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The ROI sizes that are refused are those that fail in MONAI's network, and those proposed work."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR

from bundles.common.errors import InputError
from bundles.common.networks.roi_size import check_roi_size


def forward(roi_size: tuple[int, ...], *, training: bool) -> torch.Size:
    network = SwinUNETR(1, 2, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, feature_size=12)
    with torch.no_grad():
        return network.train(training)(torch.zeros(1, 1, *roi_size)).shape


def test_valid_sizes_come_back_as_a_tuple_of_ints():
    assert check_roi_size([96, 96, 96]) == (96, 96, 96)
    assert check_roi_size((192, 192, 32)) == (192, 192, 32)
    assert check_roi_size([64, 64, 32], square_plane=(0, 1)) == (64, 64, 32)
    assert check_roi_size([32, 64, 64], square_plane=(1, 2)) == (32, 64, 64)


@pytest.mark.parametrize(
    ("roi_size", "nearest"),
    [
        ([100, 90, 96], "[96, 96, 96]"),
        ([112, 1, 96], "[128, 32, 96]"),
        ([30, 30, 30], "[64, 32, 32]"),
    ],
)
def test_a_size_that_32_does_not_divide_is_refused_with_the_nearest_valid_one(roi_size, nearest):
    with pytest.raises(InputError) as error:
        check_roi_size(roi_size)
    assert f"roi_size {roi_size}" in str(error.value)
    assert "divisible by 32" in str(error.value) and nearest in str(error.value)


@pytest.mark.parametrize("roi_size", [96, [96, 96], [96, 96, 96.5], [96, 96, 0], [96, 96, -32], "96,96,96"])
def test_anything_but_three_whole_numbers_is_refused(roi_size):
    with pytest.raises(InputError, match=r"three whole numbers .* got"):
        check_roi_size(roi_size)


@pytest.mark.parametrize("training", [True, False])
def test_32_cubed_fails_in_the_network_in_both_modes_and_the_proposed_size_works(training):
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        forward((32, 32, 32), training=training)
    with pytest.raises(InputError, match=r"\[32, 32, 32\] is too small.*\[64, 32, 32\]"):
        check_roi_size((32, 32, 32))
    assert forward(check_roi_size((64, 32, 32)), training=training) == (1, 2, 64, 32, 32)


def test_the_plane_that_rotations_turn_must_be_square():
    with pytest.raises(InputError, match=r"axes 0 and 1 must have equal sizes.*rotated by 90 degrees.*\[96, 96, 64\]"):
        check_roi_size([96, 64, 64], square_plane=(0, 1))
    with pytest.raises(InputError, match=r"axes 1 and 2 .*\[32, 64, 64\]"):
        check_roi_size([32, 64, 32], square_plane=(1, 2))
    assert check_roi_size([96, 64, 64], square_plane=(1, 2)) == (96, 64, 64)


def test_every_proposed_size_is_valid_itself():
    for plane in (None, (0, 1), (1, 2), (0, 2)):
        for roi_size in ([31, 32, 33], [32, 32, 32], [47, 48, 200], [96, 32, 64]):
            try:
                check_roi_size(roi_size, square_plane=plane)
            except InputError as error:
                proposed = [int(size) for size in str(error).rsplit("[", 1)[1].rstrip("]").split(",")]
                assert check_roi_size(proposed, square_plane=plane) == tuple(proposed)
