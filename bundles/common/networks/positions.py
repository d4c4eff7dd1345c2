# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Where in the body the voxels of a scan are: true positions by the affine, and maps that a network predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.inferers import SlidingWindowInferer

UNIT = 100.0  # mm: networks predict positions in this unit, of the order of 1


def positions(affine: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the position of every voxel in mm, float32 (B, 3, X, Y, Z).

    Args:
        affine: (B, 4, 4), voxel indices to mm in RAS.
        shape: (X, Y, Z).
    """
    matrix = affine.float()
    sums = matrix[:, :3, 3, None, None, None]
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=matrix.device, dtype=torch.float32)
        view = [1, 1, 1, 1, 1]
        view[axis + 2] = size
        sums = sums + matrix[:, :3, axis, None, None, None] * index.view(view)
    return sums


def position_map(
    predict: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    *,
    roi_size: Sequence[int],
    sw_batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the predicted position of every voxel in mm, up to a shift of the scan: float32 (3, X, Y, Z).

    Windows overlap by a quarter and are blended. A scan smaller than a window is padded with zeros (air).

    Args:
        predict: returns positions in mm (B, 3, ...) of windows (B, C, ...).
        image: (C, X, Y, Z), intensities in [0, 1].
        roi_size: window in voxels, as in the training.
        sw_batch_size: windows per forward pass.
        device: where the windows are computed.
    """
    inferer = SlidingWindowInferer(
        roi_size=list(roi_size), sw_batch_size=sw_batch_size, overlap=0.25, mode="gaussian", padding_mode="constant"
    )
    with torch.no_grad():
        return inferer(image[None].to(device), predict)[0]
