# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The data type in which CT values are kept: int16 if it is exact, else float32."""

from __future__ import annotations

from typing import Literal

import numpy as np


def int16_or_float32(values: np.ndarray, *, order: Literal["K", "C"] = "K") -> np.ndarray:
    """Convert an array to int16 if that keeps every value, else to float32.

    NaN, infinity, fractions and values outside of int16 lead to float32.

    Args:
        values: array of numbers, of any shape.
        order: memory layout of the result: ``K`` as that of ``values``, ``C`` contiguous.

    Returns:
        Array of the same shape. It is ``values`` itself if its type and layout are right already.
    """
    if values.dtype == np.int16:
        return values.astype(np.int16, order=order, copy=False)
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int16, order=order)
    if np.array_equal(whole, values):
        return whole
    return values.astype(np.float32, order=order, copy=False)
