# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check that Swin UNETR accepts an ROI size."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from ..errors import InputError

STRIDE = 32  # patch embedding by 2, then four halvings (Swin UNETR with patch size 2)


def check_roi_size(roi_size: Sequence[int], *, square_plane: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Check an ROI size (voxels along the three spatial axes) and return it as a tuple.

    Args:
        roi_size: three multiples of 32, at least one of them 64 or more. The bottleneck is 1/32 of the ROI and needs
            more than one voxel, because instance normalisation needs a variance. MONAI's instance norm keeps no
            running statistics, so this also holds in evaluation mode.
        square_plane: the two spatial axes that rotations by 90 degrees exchange (pre-training). They must have equal
            sizes.

    Raises:
        InputError: names the value, why it is invalid, and the nearest valid size.
    """
    sizes = list(roi_size) if isinstance(roi_size, (list, tuple)) else [roi_size]
    if len(sizes) != 3 or not all(isinstance(size, Integral) and size > 0 for size in sizes):
        raise InputError(f"roi_size must be three whole numbers above 0, such as [96, 96, 96], got {roi_size!r}")
    sizes = [int(size) for size in sizes]
    advice = f"use for example {_nearest(sizes, square_plane)}"
    if any(size % STRIDE for size in sizes):
        raise InputError(
            f"roi_size {sizes}: every side must be divisible by {STRIDE}, because Swin UNETR halves the ROI five times; "
            f"{advice}"
        )
    if square_plane is not None and sizes[square_plane[0]] != sizes[square_plane[1]]:
        raise InputError(
            f"roi_size {sizes}: axes {square_plane[0]} and {square_plane[1]} must have equal sizes, because views of "
            f"a crop are rotated by 90 degrees in that plane; {advice}"
        )
    if sizes == [STRIDE] * 3:
        raise InputError(
            f"roi_size {sizes} is too small: the bottleneck has only one voxel, but instance normalisation "
            f"needs more than one; {advice}"
        )
    return tuple(sizes)


def _nearest(sizes: list[int], square_plane: tuple[int, int] | None) -> list[int]:
    """Return the nearest valid size; halfway between two multiples, the larger one."""
    nearest = [max(1, (size + STRIDE // 2) // STRIDE) * STRIDE for size in sizes]
    plane = square_plane or (0, 0)
    if nearest == [STRIDE] * 3:
        nearest[plane[0]] = 2 * STRIDE
    nearest[plane[0]] = nearest[plane[1]] = max(nearest[plane[0]], nearest[plane[1]])
    return nearest
