# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Cases of the gradient of the bias, and the exact one by autograd in float64. It needs nothing but PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch

# tokens, heads, width of a head: the windows of the presets, full and cut, and all widths
SHAPES = [(343, 1, 16), (216, 2, 16), (196, 1, 16), (144, 1, 8), (64, 2, 12), (64, 1, 4), (32, 2, 32)]


class Case(NamedTuple):
    """The arguments of `bias_gradient`."""

    qkv: torch.Tensor
    grad: torch.Tensor
    out: torch.Tensor
    logsumexp: torch.Tensor
    folded: torch.Tensor
    bounds: torch.Tensor
    runs: tuple
    scale: float

    @property
    def arguments(self) -> tuple:
        return tuple(self)


def _scores(qkv, folded, bounds, scale):
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    kind = torch.repeat_interleave(torch.arange(len(folded)), bounds.diff())
    return scale * q @ k.transpose(-1, -2) + folded.double()[kind], v


def drawn_case(*, tokens, heads, width, kinds, windows=None, dtype=torch.float32) -> Case:
    """A case whose rows are padded as on a GPU; the padding is NaN. One kind in three has no windows."""
    generator = torch.Generator().manual_seed(tokens + width)
    windows = windows or (3 if tokens > 64 else 9)
    qkv = torch.randn(windows, tokens, 3, heads, width, generator=generator).to(dtype)
    grad = torch.randn(windows, tokens, heads, width, generator=generator).to(dtype)
    rows = torch.full((kinds, heads, tokens, tokens + -tokens % 8), float("nan"), dtype=dtype)
    rows[..., :tokens] = torch.randn(kinds, heads, tokens, tokens, generator=generator)
    if kinds > 1:
        rows[1:, :, :, : tokens // 3] -= 100  # a mask
    folded = rows[..., :tokens]
    owner = torch.linspace(0, kinds - 1, windows).round().long().sort().values
    owner = torch.where(owner % 3 == 1, owner - 1, owner)
    bounds = torch.searchsorted(owner, torch.arange(kinds + 1)).int()
    runs = tuple((k, int(bounds[k]), int(bounds[k + 1])) for k in range(kinds) if bounds[k] < bounds[k + 1])
    scale = width**-0.5
    scores, v = _scores(qkv, folded, bounds, scale)
    out = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous()
    sums = torch.full((windows, heads, tokens + -tokens % 32), float("nan"))
    sums[..., :tokens] = scores.logsumexp(dim=-1)
    return Case(qkv, grad, out.float(), sums[..., :tokens], folded, bounds, runs, scale)


def exact_bias_gradient(case: Case) -> torch.Tensor:
    """The gradient in float64, (heads, tokens, tokens)."""
    scores, v = _scores(case.qkv, case.folded, case.bounds, case.scale)
    bias = torch.zeros(scores.shape[1:], dtype=torch.float64, requires_grad=True)
    out = torch.softmax(scores + bias, dim=-1) @ v
    out.backward(case.grad.double().transpose(1, 2))
    return bias.grad
