# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The window of HU that becomes intensities in [0, 1], the same for crops on the CPU and batches on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.errors import InputError


def check_window(hu_window: Sequence[float]) -> tuple[float, float]:
    """The two numbers.

    Raises:
        InputError: if they are not two, the lower one first.
    """
    if not isinstance(hu_window, (list, tuple)) or len(hu_window) != 2 or not hu_window[0] < hu_window[1]:
        raise InputError(f"--hu_window {hu_window!r} must be two numbers [low, high] in HU, such as [-1000.0, 1000.0].")
    return float(hu_window[0]), float(hu_window[1])


def intensities(hu: torch.Tensor, hu_window: Sequence[float]) -> torch.Tensor:
    """HU to float32 in [0, 1], to the bit like MONAI's ``ScaleIntensityRange(low, high, 0, 1, clip=True)``."""
    low, high = hu_window
    above = hu.float() - low
    # Divided by a tensor: by a number, CUDA multiplies with its reciprocal, which is one bit off now and then.
    return (above / above.new_full((), high - low)).clamp_(0.0, 1.0)
