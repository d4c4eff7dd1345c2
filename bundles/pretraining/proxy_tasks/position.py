# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Relative position: every voxel predicts where in the body it is, in millimetres.

The target of a voxel is its position in scanner coordinates (right, anterior, superior, in mm). Scans have no common
origin, so the mean residual of the crops of one scan is subtracted: only distances within a scan count. What is the
same in all patients, the arrangement of the organs, is then what explains the distances best.

The idea is that of dense position regression: VectorPOSE (arXiv 2211.08533), relative position regression (RPR-Loc, Lei
et al., Medical Image Analysis 2021), and volume contrast by position (VoCo, CVPR 2024). It is not part of Tang et al.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.networks.positions import UNIT
from ...common.run.distributed import sum_over_ranks
from .draws import draw


def change_intensities(
    crops: torch.Tensor, *, by: float, each: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Scale the intensities of each crop by a factor from U(1 - by, 1 + by), and shift them by U(-by / 2, by / 2).

    Args:
        crops: (B, C, X, Y, Z), intensities in [0, 1].
        by: size of the change; 0 for none.
        each: crops for each generator.
        generators: random generators, on the device of the crops.
    """
    uniform = 2 * draw(generators, lambda g: torch.rand(each, 2, generator=g, device=g.device)) - 1
    scale, shift = (by * uniform).view(-1, 2, 1, 1, 1, 1).unbind(1)
    return crops * (1 + scale) + shift / 2


def residuals(predicted: torch.Tensor, target: torch.Tensor, body: torch.Tensor, crops: int) -> torch.Tensor:
    """Return the errors of positions in mm after the mean error of each scan is subtracted; 0 outside the body.

    Args:
        predicted: (B, 3, X, Y, Z), in units of `UNIT`.
        target: (B, 3, X, Y, Z), in mm.
        body: bool (B, 1, X, Y, Z), the voxels that count.
        crops: number of crops of each scan, which follow each other in the batch.

    Returns:
        float32 (B, 3, X, Y, Z).
    """
    shape = predicted.shape
    error = (UNIT * predicted.float() - target.float()).view(-1, crops, *shape[1:])
    inside = body.view(-1, crops, *body.shape[1:]).float()
    number = inside.sum(dim=(1, 2, 3, 4, 5)).clamp(min=1)
    mean = (error * inside).sum(dim=(1, 3, 4, 5)) / number[:, None]
    return ((error - mean[:, None, :, None, None, None]) * inside).view(shape)


def position_loss(error: torch.Tensor, body: torch.Tensor, *, across_ranks: bool) -> torch.Tensor:
    """Return the mean absolute `residuals` over axes and body voxels, in units of `UNIT`.

    Args:
        error: (B, 3, X, Y, Z) in mm, 0 outside the body.
        body: bool (B, 1, X, Y, Z).
        across_ranks: divide by the body voxels of all ranks, so that the mean over ranks, which
            ``DistributedDataParallel`` computes, is the loss of one process with the joined batch.
    """
    number = body.sum().float()
    if across_ranks:
        number = sum_over_ranks(number, mean=True)
    return error.abs().sum() / (3 * number.clamp(min=1) * UNIT)
