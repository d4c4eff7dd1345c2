# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Label values are whole numbers, but some programs store 1.0000001 for 1, in a float file or through a slope."""

from __future__ import annotations

import numpy as np

TOLERANCE = 1e-3  # largest distance of a label value from the whole number that it stands for


def whole_labels(values: np.ndarray) -> np.ndarray:
    """Round the values within `TOLERANCE` of a whole number to it; others, NaN and infinity stay as they are.

    Args:
        values: numbers of any type and shape. Whole-number types are returned unchanged.
    """
    if values.dtype.kind not in "fc":
        return values
    nearest = np.rint(values)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values - nearest) <= TOLERANCE, nearest, values)
