# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Select the voxels of the patient, for the bounding box of `CropForegroundd`."""

from __future__ import annotations

import torch


def above_or_all(image: torch.Tensor, other: float = 0.0) -> torch.Tensor:
    """Select the voxels above a threshold, or all voxels if none is above it: a scan of air is not cropped to nothing.

    Args:
        image: (C, X, Y, Z), in any unit.
        other: the threshold in this unit (named as in `torch.gt`).

    Returns:
        bool (C, X, Y, Z).
    """
    mask = torch.gt(image, other)
    return mask if mask.any() else torch.ones_like(mask)
