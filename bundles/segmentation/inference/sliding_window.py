# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Sliding-window prediction with Gaussian weights, which can skip windows that contain only air.

Windows, padding and weights are those of `monai.inferers.sliding_window_inference` (``mode="gaussian"``), which cannot
skip windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.utils import ensure_tuple_rep
from torch.nn import functional as F

from ...common.run.progress import with_lines

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

    A long prediction logs a line every few seconds, with the windows done and the time left.

    Products and sums are float32, whatever precision the network uses. With n windows over a voxel, the result differs
    from their exact weighted mean by at most (n + 1) * 2**-23 times their largest absolute logit.

    Args:
        images: scans. Scans smaller than a window are padded with zeros on all sides.
        network: maps windows (N, C, *roi_size) to logits (N, K, *roi_size).
        roi_size: window size in voxels.
        sw_batch_size: windows per forward pass.
        overlap: overlap of neighbouring windows as a share of the window, one number or one per axis.
        skip_air: skip windows in which all voxels of all channels are exactly 0: air in a CT after windowing, or the
            unmeasured part of an MR scan after z-scoring the rest. Voxels covered only by such windows are background:
            logit 0 for class 0, -inf for the others. No window of a scan that is 0 everywhere is skipped.
        network_device: device of the network; None: that of ``images``.
        volume_device: device on which the windows are combined, and of the result; None: that of ``images``.
    """
    network_device, volume_device = network_device or images.device, volume_device or images.device
    size = images.shape[2:]
    padding = [max(0, window - side) for window, side in zip(roi_size, size, strict=True)]
    if any(padding):
        images = F.pad(images, [half for gap in reversed(padding) for half in (gap // 2, gap - gap // 2)])
    shape = images.shape[2:]
    windows = window_places(shape, roi_size=roi_size, overlap=overlap)
    jobs = [(scan, window) for scan in range(len(images)) for window in windows]
    kept = _with_content(images, jobs) if skip_air else jobs

    importance = importance_map(tuple(roi_size), volume_device)
    weights = torch.zeros((len(images), 1, *shape), device=volume_device)
    logits = None
    outputs = _outputs(images, kept, network, sw_batch_size, network_device, volume_device)
    for (scan, window), output in with_lines(outputs, len(kept), doing="segmenting", unit="windows", says_end=False):
        if logits is None:
            logits = torch.zeros((len(images), len(output), *shape), device=volume_device)
        logits[(scan, slice(None), *window)].addcmul_(output.float(), importance)
        weights[(scan, slice(None), *window)] += importance
    if len(kept) < len(jobs):
        unseen = weights == 0
        weights[unseen] = 1
        logits /= weights
        logits.masked_fill_(unseen, -math.inf)
        logits[:, :1].masked_fill_(unseen, 0)
    else:
        logits /= weights
    begin = [gap // 2 for gap in padding]
    return logits[(..., *(slice(first, first + length) for first, length in zip(begin, size, strict=True)))]


def window_places(shape: Sequence[int], *, roi_size: Sequence[int], overlap: float | Sequence[float]) -> list[Window]:
    """Return the windows on a grid at least as large as one: evenly spaced from the start, the last one at the end."""
    steps = [
        max(1, int(size * (1 - share))) for size, share in zip(roi_size, ensure_tuple_rep(overlap, 3), strict=True)
    ]
    return dense_patch_slices(shape, roi_size, steps)


@lru_cache(maxsize=4)
def importance_map(roi_size: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return the weights of a window's voxels, float32: a Gaussian, sigma = side / 8. Cached: do not modify them."""
    return compute_importance_map(roi_size, mode="gaussian", sigma_scale=0.125, device=device, dtype=torch.float32)


def _outputs(
    images: torch.Tensor,
    jobs: Sequence[tuple[int, Window]],
    network: torch.nn.Module,
    at_once: int,
    network_device: torch.device,
    volume_device: torch.device,
) -> Iterator[tuple[tuple[int, Window], torch.Tensor]]:
    """Yield each job with the logits (K, *window) of its window."""
    for start in range(0, len(jobs), at_once):
        batch = jobs[start : start + at_once]
        inputs = torch.stack([images[(scan, slice(None), *window)] for scan, window in batch]).to(network_device)
        yield from zip(batch, network(inputs).to(volume_device), strict=True)


def _with_content(images: torch.Tensor, jobs: Sequence[tuple[int, Window]]) -> list[tuple[int, Window]]:
    """Return the jobs without windows that hold only zeros. Scans that are 0 everywhere keep all their windows."""
    flags = [images[(scan, slice(None), *window)].any() for scan, window in jobs]
    content = torch.stack(flags).tolist()  # one GPU synchronisation, not one per window
    not_empty = {scan for (scan, _), has_content in zip(jobs, content, strict=True) if has_content}
    return [job for job, has_content in zip(jobs, content, strict=True) if has_content or job[0] not in not_empty]
