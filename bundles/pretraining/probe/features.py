# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Features of several resolutions as one vector per voxel of the window (a hypercolumn).

Each tensor is interpolated trilinearly to the voxels of the window, and the channels are put side by side: Hariharan et
al., Hypercolumns for Object Segmentation and Fine-grained Localization, CVPR 2015, arXiv 1411.5752.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.utils import eval_mode
from torch.nn import functional as F

from ...common.run.distributed import unwrap


def intensities(windows: torch.Tensor) -> list[torch.Tensor]:
    """Return the windows themselves, (B, C, X, Y, Z), as the only features."""
    return [windows]


def frozen_features(
    network: torch.nn.Module,
    windows: torch.Tensor,
    *,
    amp: bool = False,
    amp_kwargs: Mapping[str, Any] | None = None,
) -> list[torch.Tensor]:
    """Return the intensities and what ``network.features`` returns, in eval mode and without gradients.

    Args:
        network: its ``features(windows)`` returns tensors (B, C', X', Y', Z') of any resolution.
        windows: (B, C, X, Y, Z), intensities in [0, 1].
        amp: use mixed precision.
        amp_kwargs: arguments of ``torch.autocast``.

    Returns:
        float32 tensors, the finest first: a voxel's intensity is a feature, too, because the encoder starts at 1/2.
    """
    network = unwrap(network)
    with eval_mode(network), torch.autocast(windows.device.type, enabled=amp, **(amp_kwargs or {})):
        features = network.features(windows)
    return [windows, *(feature.float() for feature in features)]


def at_voxels(features: Sequence[torch.Tensor], voxels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Interpolate the features of one window to some of its voxels.

    Args:
        features: tensors (C, X', Y', Z') of the window, C and resolution of each as they come.
        voxels: indices of N voxels of the window, (N, 3).
        size: (X, Y, Z) of the window.

    Returns:
        (N, sum of C): the values that ``interpolate(mode="trilinear", align_corners=False)`` of each tensor to the size
        of the window has at these voxels.
    """
    # centres of voxels, -1 and 1 being the outer faces of the window; grid_sample wants the last axis first
    grid = (2 * voxels.double() + 1) / torch.tensor(size, dtype=torch.float64) - 1
    grid = grid.flip(1).float().reshape(1, 1, 1, -1, 3)
    columns = [
        F.grid_sample(feature[None], grid.to(feature), padding_mode="border", align_corners=False)[0, :, 0, 0]
        for feature in features
    ]
    return torch.cat(columns).T


def linear_map(
    features: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, size: Sequence[int]
) -> torch.Tensor:
    """Return ``weight @ hypercolumn + bias`` at every voxel of the windows, without forming the hypercolumns.

    A linear map of the channels and an interpolation in space commute, so each tensor is mapped to K channels at its
    own resolution and then interpolated: with 1,489 features and 14 classes a hundredth of the memory.

    Args:
        features: tensors (B, C, X', Y', Z').
        weight: (K, sum of C).
        bias: (K,).
        size: (X, Y, Z) of the windows.

    Returns:
        (B, K, X, Y, Z).
    """
    parts = weight.split([feature.shape[1] for feature in features], dim=1)
    total = bias.to(features[0])[:, None, None, None]
    for feature, part in zip(features, parts, strict=True):
        # Not conv3d: cuDNN would round to TF32 on a GPU, and the weights were fitted in float64.
        mapped = torch.einsum("kc,bcxyz->bkxyz", part.to(feature), feature)
        if tuple(mapped.shape[2:]) != tuple(size):
            mapped = F.interpolate(mapped, size=tuple(size), mode="trilinear", align_corners=False)
        total = total + mapped
    return total
