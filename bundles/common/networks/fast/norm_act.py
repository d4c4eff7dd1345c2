# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Fused instance norm, residual and leaky ReLU on a CPU: keeps one tensor for the backward; PyTorch keeps two or three.

Leaky ReLU is invertible: y = act(n) determines n and its slope, so the input of the norm need not be kept, and
sum(dn n) equals sum(dy y). All work is done channels-last, a few rows at a time, in the memory of the convolution's
output, because on a CPU allocating memory costs more than arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 2**20  # numbers processed at a time: they stay in the cache from one operation to the next


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor (B, C, X, Y, Z), channels-last in memory, as a view (B, voxels, C)."""
    return x.detach().movedim(1, -1).flatten(1, -2)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split the rows (voxels, C) of one sample into chunks, in the same way for several tensors."""
    rows = max(1, CHUNK // tensors[0].shape[-1])
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _statistics(rows: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and 1 / sqrt(variance + eps) of each channel of one sample, computed in two passes."""
    wide = _wide(rows.dtype)
    total = torch.zeros(rows.shape[1], dtype=wide)
    for (chunk,) in _chunks(rows):
        total += chunk.sum(dim=0, dtype=wide)
    mean = total / len(rows)
    total = torch.zeros_like(mean)
    for (chunk,) in _chunks(rows):
        total += (chunk - mean).square_().sum(dim=0)
    return mean, (total / len(rows) + eps).rsqrt()


def _normalise_(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute (x - mean) / std in place, per channel; return 1 / std."""
    mean, scale = _statistics(rows, eps)
    shift = -mean * scale
    for (chunk,) in _chunks(rows):
        if chunk.dtype == scale.dtype:
            torch.addcmul(shift, chunk, scale, out=chunk)
        else:
            chunk.copy_(torch.addcmul(shift, chunk.to(scale.dtype), scale))
    return scale


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


class _NormAct(torch.autograd.Function):
    """act(norm(x)), written into the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: float, eps: float) -> torch.Tensor:
        y = _channels_last(x.detach())
        scales = []
        for rows in _rows(y):
            scales.append(_normalise_(rows, eps))
            for (chunk,) in _chunks(rows):
                F.leaky_relu_(chunk, slope)
        ctx.slope = slope
        ctx.save_for_backward(y, torch.stack(scales))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        y, scales = ctx.saved_tensors
        out = torch.empty_like(y)
        for g, a, o, scale in zip(_rows(_channels_last(grad)), _rows(y), _rows(out), scales, strict=True):
            first, second = torch.zeros_like(scale), torch.zeros_like(scale)
            for gc, ac, oc in _chunks(g, a, o):
                _slope_of(gc, ac, ctx.slope, out=oc)
                first += oc.sum(dim=0, dtype=scale.dtype)
                second += (gc.to(scale.dtype) * ac).sum(dim=0)
            first, second = first / len(g), second / len(g)
            for ac, oc in _chunks(a, o):
                normed = F.leaky_relu(ac.to(scale.dtype), 1 / ctx.slope)
                oc.copy_(normed.mul_(second).add_(first).neg_().add_(oc).mul_(scale))
        return out, None, None


def _slope_of(grad: torch.Tensor, y: torch.Tensor, slope: float, *, out: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of the input of the activation whose output is y."""
    return torch.ops.aten.leaky_relu_backward(grad, y, slope, True, grad_input=out)


class _ResidualNormAct(torch.autograd.Function):
    """act(norm(x) + residual), or act(norm(x) + norm(residual)); x is overwritten by norm(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, norm_residual: bool, slope: float, eps: float
    ) -> torch.Tensor:
        normed, other = _channels_last(x.detach()), _channels_last(residual.detach())
        # a residual that is to be normalised is a convolution's output, and may be overwritten; any other may not
        y = other if norm_residual else torch.empty_like(normed)
        scales, other_scales = [], []
        for n, r, o in zip(_rows(normed), _rows(other), _rows(y), strict=True):
            scales.append(_normalise_(n, eps))
            if norm_residual:
                other_scales.append(_normalise_(r, eps))
            for nc, rc, oc in _chunks(n, r, o):
                F.leaky_relu_(torch.add(nc, rc, out=oc), slope)
        ctx.slope, ctx.norm_residual = slope, norm_residual
        ctx.save_for_backward(y, normed, torch.stack(scales), torch.stack(other_scales) if norm_residual else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        y, normed, scales, other_scales = ctx.saved_tensors
        grad = _channels_last(grad)
        before = torch.empty_like(y)  # gradient of the activation's input, and of a residual without norm
        out = torch.empty_like(y)
        for sample, scale in enumerate(scales):
            g, a, n, b, o = (_rows(t[sample : sample + 1])[0] for t in (grad, y, normed, before, out))
            sums = torch.zeros(3, *scale.shape, dtype=scale.dtype)
            for gc, ac, nc, bc in _chunks(g, a, n, b):
                _slope_of(gc, ac, ctx.slope, out=bc)
                sums[0] += bc.sum(dim=0, dtype=scale.dtype)
                sums[1] += (bc.to(scale.dtype) * nc).sum(dim=0)
                sums[2] += (gc.to(scale.dtype) * ac).sum(dim=0)
            mean, along, along_both = sums / len(g)
            for ac, nc, bc, oc in _chunks(a, n, b, o):
                wide = nc.to(scale.dtype)
                oc.copy_(torch.mul(wide, -along).sub_(mean).add_(bc).mul_(scale))
                if ctx.norm_residual:
                    # act^-1(y) is norm(x) + norm(residual)
                    rest = F.leaky_relu(ac.to(scale.dtype), 1 / ctx.slope).sub_(wide)
                    bc.copy_(rest.mul_(along - along_both).sub_(mean).add_(bc).mul_(other_scales[sample]))
        return out, before, None, None, None


@torch.compiler.disable  # do not unroll the loops over rows: a graph break under torch.compile, on CPUs only
def norm_act(x: torch.Tensor, *, slope: float, eps: float = 1e-5) -> torch.Tensor:
    """Compute ``leaky_relu(instance_norm(x))`` of a convolution's output on a CPU, in the memory of ``x``.

    Args:
        x: (B, C, X, Y, Z), overwritten. Nothing else may read it, in the backward either.
        slope: negative slope of the leaky ReLU; must be above 0.
        eps: epsilon of the norm, which has neither weights nor running statistics.

    Returns:
        The result, in the memory of ``x`` if that is channels-last, in the dtype of ``x``. Statistics are computed in
        float32 or wider.
    """
    return _NormAct.apply(x, slope, eps)


@torch.compiler.disable
def residual_norm_act(
    x: torch.Tensor, residual: torch.Tensor, *, norm_residual: bool, slope: float, eps: float = 1e-5
) -> torch.Tensor:
    """Compute ``leaky_relu(instance_norm(x) + residual)``, optionally with a normalised residual; see `norm_act`.

    Args:
        x: overwritten, as in `norm_act`.
        residual: same shape as ``x``; overwritten if ``norm_residual``.
        norm_residual: also apply an instance norm to ``residual``.
        slope: negative slope of the leaky ReLU.
        eps: epsilon of the norms.
    """
    return _ResidualNormAct.apply(x, residual, norm_residual, slope, eps)
