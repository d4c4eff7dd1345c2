# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which voxels are the patient: what `CropForegroundd` draws its box around."""

from __future__ import annotations

import torch


def above_or_all(image: torch.Tensor, other: float = 0.0) -> torch.Tensor:
    """Voxels above a threshold; all of them where none is, so that a scan of air is cropped to itself and not to nothing.

    Args:
        image: (C, X, Y, Z), of any unit.
        other: the threshold in that unit (named as in `torch.gt`).

    Returns:
        bool (C, X, Y, Z).
    """
    mask = torch.gt(image, other)
    return mask if mask.any() else torch.ones_like(mask)
