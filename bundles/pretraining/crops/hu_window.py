# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Map a window of HU to intensities in [0, 1], with equal results for crops on the CPU and batches on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.errors import InputError
from ...common.run.options import check_option


def check_window(hu_window: Sequence[float]) -> tuple[float, float]:
    """Return the window as two numbers.

    Raises:
        InputError: it is not two numbers, the lower one first.
    """
    check_option("hu_window", hu_window, not_null=True)
    return float(hu_window[0]), float(hu_window[1])


def body_threshold(hu_window: Sequence[float], foreground_hu: float) -> float:
    """Return the intensity, in [0, 1] of the window, above which a voxel counts as body.

    Args:
        hu_window: the two HU that become 0 and 1.
        foreground_hu: HU above which a voxel counts as body.

    Raises:
        InputError: the window does not contain ``foreground_hu``: every voxel would count as body, or none.
    """
    low, high = check_window(hu_window)
    check_option("foreground_hu", foreground_hu, not_null=True)
    if not low <= foreground_hu < high:
        raise InputError(
            f"--foreground_hu {foreground_hu:g} is outside of --hu_window [{low:g}, {high:g}]: "
            f"{'every voxel' if foreground_hu < low else 'no voxel'} would count as body. Set it inside, such as "
            f"--foreground_hu {low:g}, or widen the window."
        )
    return (foreground_hu - low) / (high - low)


def intensities(hu: torch.Tensor, hu_window: Sequence[float]) -> torch.Tensor:
    """Map HU to float32 in [0, 1], bit-identical to MONAI's ``ScaleIntensityRange(low, high, 0, 1, clip=True)``."""
    low, high = hu_window
    above = hu.float() - low
    # Divide by a tensor: for a number, CUDA multiplies by the reciprocal, which is sometimes off by one bit.
    return (above / above.new_full((), high - low)).clamp_(0.0, 1.0)
