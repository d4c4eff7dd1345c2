# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Map a window of HU to intensities in [0, 1], with equal results for crops on the CPU and batches on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.run.options import check_option


def check_window(hu_window: Sequence[float]) -> tuple[float, float]:
    """Return the window as two numbers.

    Raises:
        InputError: it is not two numbers, the lower one first.
    """
    check_option("hu_window", hu_window, not_null=True)
    return float(hu_window[0]), float(hu_window[1])


def intensities(hu: torch.Tensor, hu_window: Sequence[float]) -> torch.Tensor:
    """Map HU to float32 in [0, 1], bit-identical to MONAI's ``ScaleIntensityRange(low, high, 0, 1, clip=True)``."""
    low, high = hu_window
    above = hu.float() - low
    # Divide by a tensor: for a number, CUDA multiplies by the reciprocal, which is sometimes off by one bit.
    return (above / above.new_full((), high - low)).clamp_(0.0, 1.0)
