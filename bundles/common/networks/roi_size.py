# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which ROI sizes Swin UNETR can take."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from ..errors import InputError

STRIDE = 32  # patch embedding by 2, then four halvings (Swin UNETR with patch size 2)


def check_roi_size(roi_size: Sequence[int], *, square_plane: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Check an ROI size (voxels along the three spatial axes) and return it as a tuple.

    Args:
        roi_size: three multiples of 32, one of them at least 64: the bottleneck, at 1/32, needs more than one voxel,
            because instance normalisation has no variance of a single one. MONAI's keeps no running statistics, so
            that holds in evaluation mode, too.
        square_plane: the two spatial axes that rotations by 90 degrees turn into each other (pre-training); they must
            have one size.

    Raises:
        InputError: names the value, why it cannot be, and the nearest size that can.
    """
    sizes = list(roi_size) if isinstance(roi_size, (list, tuple)) else [roi_size]
    if len(sizes) != 3 or not all(isinstance(size, Integral) and size > 0 for size in sizes):
        raise InputError(f"roi_size must be three whole numbers above 0, such as [96, 96, 96], got {roi_size!r}")
    sizes = [int(size) for size in sizes]
    advice = f"use for example {_nearest(sizes, square_plane)}"
    if any(size % STRIDE for size in sizes):
        raise InputError(
            f"roi_size {sizes}: every side must be divisible by {STRIDE}, for Swin UNETR halves the ROI five times; "
            f"{advice}"
        )
    if square_plane is not None and sizes[square_plane[0]] != sizes[square_plane[1]]:
        raise InputError(
            f"roi_size {sizes}: axes {square_plane[0]} and {square_plane[1]} must have one size, because views of "
            f"a crop are turned by 90 degrees in that plane; {advice}"
        )
    if sizes == [STRIDE] * 3:
        raise InputError(
            f"roi_size {sizes} is too small: one voxel is left at the bottleneck, and instance normalisation "
            f"needs more than one; {advice}"
        )
    return tuple(sizes)


def _nearest(sizes: list[int], square_plane: tuple[int, int] | None) -> list[int]:
    """The nearest valid size; halfway between two multiples, the larger."""
    nearest = [max(1, (size + STRIDE // 2) // STRIDE) * STRIDE for size in sizes]
    plane = square_plane or (0, 0)
    if nearest == [STRIDE] * 3:
        nearest[plane[0]] = 2 * STRIDE
    nearest[plane[0]] = nearest[plane[1]] = max(nearest[plane[0]], nearest[plane[1]])
    return nearest
