# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Partition tokens into windows, and compute the attention masks of shifted windows, once per shape.

MONAI pads, rolls and partitions with one copy each, and rebuilds a mask for every window in a 27-step loop. Here a
single gather replaces the copies. Only the last window along an axis contains a seam, so there are at most 2^3
different masks for any number of windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

SEAM = -100.0  # added by MONAI to the score of two tokens that only a shift has made neighbours


class WindowPlan(NamedTuple):
    """Windows of the grids of all samples, sorted so that windows with equal masks are contiguous.

    So all windows of a batch that share a mask go through attention in one call. In a plan for an export, the numbers
    are those of one sample, and the samples stay apart.

    Attributes:
        window: tokens of a window along each axis.
        take: (windows x tokens,) index of the token at each position of the windows, among the tokens of all samples;
            0 where the position is padding.
        put: (samples x grid tokens,) position in the windows of each token.
        padding: positions without a token; they are zero. None in a plan for an export.
        masks: (kinds, tokens, tokens) added to the scores, 0 or `SEAM`; None if the windows are not shifted.
        kind: (windows,) index of each window's mask; None if ``masks`` has one for each window.
        runs: (kind, first window, last window + 1), all windows in order.
        bounds: (kinds + 1,) int32, the first window of each kind, and the number of windows. Not in a plan for an
            export.
        real: (windows x tokens, 1), 1 for a token and 0 for padding; None if there is no padding. Only in a plan for an
            export.
    """

    window: tuple[int, ...]
    take: torch.Tensor
    put: torch.Tensor
    padding: torch.Tensor | None
    masks: torch.Tensor | None
    kind: torch.Tensor | None
    runs: tuple[tuple[int, int, int], ...]
    bounds: torch.Tensor | None = None
    real: torch.Tensor | None = None

    @property
    def windows(self) -> int:
        return len(self.take) // math.prod(self.window)

    def dense_mask(self) -> torch.Tensor | None:
        """Return one mask per window, (windows, tokens, tokens), as MONAI's `WindowAttention` expects it."""
        return self.masks if self.masks is None or self.kind is None else self.masks[self.kind]


def _masks(window: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """Return the masks of the 2^axes kinds of windows; an axis without a shift has no seam."""
    masks = []
    for last in itertools.product((0, 1), repeat=len(window)):
        sides = [np.arange(w) >= w - s * end for w, s, end in zip(window, shift, last, strict=True)]
        # (axes, tokens): the side of the seam that a token is on
        side = np.stack([axis.ravel() for axis in np.meshgrid(*sides, indexing="ij")])
        masks.append((side[:, :, None] != side[:, None, :]).any(axis=0) * np.float32(SEAM))
    return np.stack(masks)


class _Arrays(NamedTuple):
    """The arrays of a `WindowPlan`; ``take`` is -1 where the position is padding."""

    take: np.ndarray
    put: np.ndarray
    masks: np.ndarray | None
    kind: np.ndarray


def _arrays(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> _Arrays:
    """Compute a plan in NumPy, so that a traced or exported network gets constants, not the operations for them."""
    counts = [math.ceil(g / w) for g, w in zip(grid, window, strict=True)]
    padded = [n * w for n, w in zip(counts, window, strict=True)]
    token = np.full(padded, -1)
    token[tuple(slice(g) for g in grid)] = np.arange(math.prod(grid)).reshape(grid)
    axes = range(len(grid))
    token = np.roll(token, [-s for s in shift], axis=tuple(axes))
    token = token.reshape([n for pair in zip(counts, window, strict=True) for n in pair])
    token = token.transpose([2 * a for a in axes] + [2 * a + 1 for a in axes]).reshape(math.prod(counts), -1)
    last = [(np.arange(n) == n - 1) & (s > 0) for n, s in zip(counts, shift, strict=True)]
    kind = np.zeros(counts, dtype=np.int64)
    for ends in np.meshgrid(*last, indexing="ij"):
        kind = 2 * kind + ends
    kind = kind.ravel()
    order = np.argsort(kind, kind="stable")
    take = token[order].ravel()
    put = np.empty(math.prod(grid), dtype=np.int64)
    places = np.flatnonzero(take >= 0)
    put[take[places]] = places
    return _Arrays(take, put, _masks(window, shift) if any(shift) else None, kind[order])


def _batched(arrays: _Arrays, tokens: int, samples: int) -> _Arrays:
    """Number the tokens and the positions of all samples: each window of the first sample, then of the second, ..."""
    take, put, masks, kind = arrays
    sample = np.arange(samples)
    take = take.reshape(-1, 1, tokens)
    take = np.where(take < 0, -1, take + sample[:, None] * len(put))
    put = put + put // tokens * tokens * (samples - 1) + sample[:, None] * tokens
    return _Arrays(take.ravel(), put.ravel(), masks, kind.repeat(samples))


@lru_cache(maxsize=64)
def window_plan(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device, samples: int = 1
) -> WindowPlan:
    """Return the windows of grids that are first padded at their far ends to whole windows, then rolled by ``-shift``.

    Args:
        grid: tokens along each axis.
        window: tokens of a window along each axis, at most those of the grid.
        shift: shift of the windows along each axis; 0 for no shift and along an axis with a single window.
        device: device of the plan's tensors.
        samples: number of grids.
    """
    take, put, masks, kind = _batched(_arrays(grid, window, shift), math.prod(window), samples)
    kinds = 1 if masks is None else len(masks)
    starts = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]
    # tensors created in inference mode could not be used in training later
    with torch.inference_mode(False), torch.no_grad():
        return WindowPlan(
            window=tuple(window),
            take=torch.from_numpy(take.clip(min=0)).to(device),
            put=torch.from_numpy(put).to(device),
            padding=torch.from_numpy(np.flatnonzero(take < 0)).to(device),
            masks=None if masks is None else torch.from_numpy(masks).to(device),
            kind=torch.from_numpy(kind).to(device),
            runs=tuple((int(kind[a]), a, b) for a, b in itertools.pairwise(starts)),
            bounds=torch.from_numpy(np.searchsorted(kind, range(kinds + 1)).astype(np.int32)).to(device),
        )


def export_plan(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> WindowPlan:
    """Return the plan with only the tensors that an exported network has as constants."""
    take, put, masks, kind = _arrays(grid, window, shift)
    padded = (take < 0).any()
    return WindowPlan(
        window=tuple(window),
        take=torch.from_numpy(take.clip(min=0)).to(device),
        put=torch.from_numpy(put).to(device),
        padding=None,
        masks=None if masks is None else torch.from_numpy(masks[kind]).to(device),
        kind=None,
        runs=(),
        real=torch.from_numpy((take >= 0).astype(np.float32)[:, None]).to(device) if padded else None,
    )


class _Gather(torch.autograd.Function):
    """Gather rows by index; the backward is a gather by the inverse index (autograd's would add row by row)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: WindowPlan, to_windows: bool) -> torch.Tensor:
        ctx.plan, ctx.to_windows = plan, to_windows
        return _gather(x, plan, to_windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(grad, ctx.plan, not ctx.to_windows), None, None


def _gather(x: torch.Tensor, plan: WindowPlan, to_windows: bool) -> torch.Tensor:
    rows = x.index_select(0, plan.take if to_windows else plan.put)
    if to_windows and len(plan.padding):
        rows.index_fill_(0, plan.padding, 0)
    return rows


def to_windows(x: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
    """Rearrange tokens (B, *grid, C) to windows (windows of all samples, tokens, C); padding is zero."""
    rows = _Gather.apply(x.flatten(0, -2), plan, True)
    return rows.view(-1, math.prod(plan.window), x.shape[-1])


def export_to_windows(x: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
    """Rearrange tokens to windows, sample after sample, by operations that every exporter knows."""
    rows = x.flatten(1, -2).index_select(1, plan.take)
    rows = rows if plan.real is None else rows * plan.real
    return rows.reshape(-1, math.prod(plan.window), x.shape[-1])


def export_from_windows(windows: torch.Tensor, plan: WindowPlan, grid: Sequence[int]) -> torch.Tensor:
    """Undo `export_to_windows` by operations that every exporter knows."""
    rows = windows.reshape(-1, plan.windows * math.prod(plan.window), windows.shape[-1]).index_select(1, plan.put)
    return rows.reshape(-1, *grid, windows.shape[-1])


def from_windows(windows: torch.Tensor, plan: WindowPlan, grid: Sequence[int]) -> torch.Tensor:
    """Rearrange windows back to tokens (B, *grid, C); padding is dropped."""
    rows = _Gather.apply(windows.flatten(0, 1), plan, False)
    return rows.view(-1, *grid, windows.shape[2])
