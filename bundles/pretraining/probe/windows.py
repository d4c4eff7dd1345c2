# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Windows that tile a scan: always the same ones, and every voxel belongs to exactly one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data.utils import dense_patch_slices
from torch.nn import functional as F


def padded(image: torch.Tensor, roi_size: Sequence[int]) -> torch.Tensor:
    """Return the image (C, X, Y, Z) with zeros (air) at the upper ends of axes that are shorter than a window."""
    lacking = [max(0, roi - size) for size, roi in zip(image.shape[1:], roi_size, strict=True)]
    return F.pad(image, [pad for each in reversed(lacking) for pad in (0, each)])


def windows_of(shape: Sequence[int], roi_size: Sequence[int]) -> list[tuple[slice, ...]]:
    """Return the windows of a padded image (X, Y, Z). The last ones of an axis may overlap those before."""
    return dense_patch_slices(shape, roi_size, roi_size)


def owners(voxels: torch.Tensor, windows: Sequence[tuple[slice, ...]]) -> torch.Tensor:
    """Return the number of the window to which each of the voxels (N, 3) belongs: the last that contains it, (N,)."""
    owner = torch.full((len(voxels),), -1)
    for number, window in enumerate(windows):
        inside = [(voxels[:, axis] >= part.start) & (voxels[:, axis] < part.stop) for axis, part in enumerate(window)]
        owner[inside[0] & inside[1] & inside[2]] = number
    return owner
