# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a network says of windows of a scan, blended with Gaussian weights; windows of nothing but air are left out.

Windows, padding and weights are those of `monai.inferers.sliding_window_inference` (``mode="gaussian"``), which cannot
leave out a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.utils import ensure_tuple_rep
from torch.nn import functional as F

Window = tuple[slice, slice, slice]


def blend_windows(
    images: torch.Tensor,
    network: torch.nn.Module,
    *,
    roi_size: Sequence[int],
    sw_batch_size: int,
    overlap: float | Sequence[float],
    skip_air: bool = False,
    network_device: torch.device | None = None,
    volume_device: torch.device | None = None,
) -> torch.Tensor:
    """Return the blended logits (B, K, X, Y, Z) of scans (B, C, X, Y, Z), float32.

    Whatever the network computes in, products and sums are float32: n windows over a voxel put it no further from their
    exact mean than (n + 1) * 2**-23 times their largest absolute logit.

    Args:
        images: scans; where one is smaller than a window, zeros are put around it.
        network: maps windows (N, C, *roi_size) to logits (N, K, *roi_size).
        roi_size: voxels of a window.
        sw_batch_size: windows per forward.
        overlap: of neighbouring windows, as a share of the window, one number or one per axis.
        skip_air: leave out windows in which all voxels of all channels are exactly 0, as air is after windowing (CT)
            and what was not measured after a z-score of the rest (MR). Voxels that only such windows cover are
            background: logit 0 for class 0, -inf for the others. A scan that is 0 throughout keeps all its windows.
        network_device: where the network is; None: as ``images``.
        volume_device: where the windows are put together, and the result lies; None: as ``images``.
    """
    network_device, volume_device = network_device or images.device, volume_device or images.device
    size = images.shape[2:]
    room = [max(0, window - given) for window, given in zip(roi_size, size, strict=True)]
    if any(room):
        images = F.pad(images, [half for gap in reversed(room) for half in (gap // 2, gap - gap // 2)])
    shape = images.shape[2:]
    windows = window_places(shape, roi_size=roi_size, overlap=overlap)
    jobs = [(scan, window) for scan in range(len(images)) for window in windows]
    wanted = _with_content(images, jobs) if skip_air else jobs

    importance = importance_map(tuple(roi_size), volume_device)
    weights = torch.zeros((len(images), 1, *shape), device=volume_device)
    logits = None
    for start in range(0, len(wanted), sw_batch_size):
        batch = wanted[start : start + sw_batch_size]
        outputs = network(
            torch.stack([images[(scan, slice(None), *window)] for scan, window in batch]).to(network_device)
        )
        if logits is None:
            logits = torch.zeros((len(images), outputs.shape[1], *shape), device=volume_device)
        for (scan, window), output in zip(batch, outputs.to(volume_device), strict=True):
            logits[(scan, slice(None), *window)].addcmul_(output.float(), importance)
            weights[(scan, slice(None), *window)] += importance
    if len(wanted) < len(jobs):
        unseen = weights == 0
        weights[unseen] = 1
        logits /= weights
        logits.masked_fill_(unseen, -math.inf)
        logits[:, :1].masked_fill_(unseen, 0)
    else:
        logits /= weights
    begin = [gap // 2 for gap in room]
    return logits[(..., *(slice(first, first + length) for first, length in zip(begin, size, strict=True)))]


def window_places(shape: Sequence[int], *, roi_size: Sequence[int], overlap: float | Sequence[float]) -> list[Window]:
    """Where the windows lie on a grid no smaller than one: evenly from the start, the last one flush with the end."""
    steps = [
        max(1, int(size * (1 - share))) for size, share in zip(roi_size, ensure_tuple_rep(overlap, 3), strict=True)
    ]
    return dense_patch_slices(shape, roi_size, steps)


@lru_cache(maxsize=4)
def importance_map(roi_size: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Weight of each voxel of a window, float32: a Gaussian of an eighth of its side. Shared: do not write to it."""
    return compute_importance_map(roi_size, mode="gaussian", sigma_scale=0.125, device=device, dtype=torch.float32)


def _with_content(images: torch.Tensor, jobs: Sequence[tuple[int, Window]]) -> list[tuple[int, Window]]:
    """Scans and windows without those where all is 0, but for scans that are 0 throughout."""
    flags = [images[(scan, slice(None), *window)].any() for scan, window in jobs]
    content = torch.stack(flags).tolist()  # one wait for the GPU, not one per window
    seen = {scan for (scan, _), something in zip(jobs, content, strict=True) if something}
    return [job for job, something in zip(jobs, content, strict=True) if something or job[0] not in seen]
