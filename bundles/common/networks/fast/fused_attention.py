# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Window attention on a GPU: PyTorch's memory-efficient kernel, one call for all windows that share a mask.

The kernel is called by its name. `scaled_dot_product_attention` would choose: cuDNN's attention where no gradient of
the bias is needed (so a first validation would be its first try), whose backward gave NaN on an H100 for a mask and 64
tokens, 192, 320, ... (https://github.com/pytorch/pytorch/issues/196678); or the plain formula with its table of scores.

The kernel computes the gradients of queries, keys and values, and `bias_gradient` that of the bias. Both add up in a
fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .bias_gradient import bias_gradient
from .windows import WindowPlan

NO_MASK_TYPE = 0  # the kernel's mask type: neither causal nor a band
ALIGNMENT = 16  # bytes; the width of a head must be a multiple of it


def fold(bias: torch.Tensor, masks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Add position bias and shift masks: (kinds, heads, tokens, tokens) in the dtype of the queries.

    A mask of another dtype is refused by the fused kernels, or misread. The stride of the rows is a multiple of 8.
    Otherwise the kernels of a GPU would copy the bias at every call.

    Args:
        bias: (heads, tokens, tokens + padding to a multiple of 8).
        masks: (kinds, tokens, tokens) or None.
        dtype: dtype of the queries.
    """
    tokens = bias.shape[1]
    folded = bias[None] if masks is None else bias + F.pad(masks, (0, -tokens % 8))[:, None].to(bias.dtype)
    return folded.to(dtype)[..., :tokens]


def has_efficient_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether PyTorch's memory-efficient kernel computes in this dtype on this device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype in (torch.float32, torch.float16)


def attend(
    qkv: torch.Tensor, bias: torch.Tensor, scale: float, *, for_backward: bool
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Call the kernel for windows with one bias.

    Args:
        qkv: (windows, tokens, 3, heads, width).
        bias: (heads, tokens, tokens), the same for every window.
        scale: factor of the scores.
        for_backward: also compute the logsumexp of the scores.

    Returns:
        Output (windows, tokens, heads, width), logsumexp (windows, heads, tokens with padding), and the state of the
        random generator, which the backward needs.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    bias = bias.expand(len(q), -1, -1, -1)
    out, logsumexp, *generator = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, for_backward, scale=scale
    )
    return out.transpose(1, 2), logsumexp, generator


def attend_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    generator: Any,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values, each (windows, tokens, heads, width).

    The keys are not divided between programs, which would add to the gradient of the queries in any order.
    """
    tokens = qkv.shape[1]
    return torch.ops.aten._efficient_attention_backward(
        *(grad, *qkv.unbind(2), bias.expand(len(qkv), -1, -1, -1), out),
        *(None, None, tokens, tokens, logsumexp, 0.0, *generator, NO_MASK_TYPE, False),
        scale=scale,
        num_splits_key=1,
    )[:3]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        bias: torch.Tensor,
        masks: torch.Tensor | None,
        bounds: torch.Tensor,
        runs: tuple,
        scale: float,
    ) -> torch.Tensor:
        folded = fold(bias, masks, qkv.dtype)
        parts = [attend(qkv[a:b], folded[kind], scale, for_backward=True) for kind, a, b in runs]
        out, logsumexp = (_joined([part[n] for part in parts]) for n in (0, 1))
        ctx.save_for_backward(qkv, folded, out, logsumexp)
        ctx.bounds, ctx.runs, ctx.scale, ctx.generator = bounds, runs, scale, parts[0][2]
        ctx.bias = bias.shape, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, folded, out, logsumexp = ctx.saved_tensors
        grad = grad.to(qkv.dtype).contiguous()
        grad_qkv = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_qkv = torch.empty_like(qkv)
            for kind, a, b in ctx.runs:
                saved = qkv[a:b], folded[kind], out[a:b], logsumexp[a:b]
                parts = attend_backward(grad[a:b], *saved, ctx.generator, ctx.scale)
                torch.stack(parts, dim=2, out=grad_qkv[a:b])
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.bias
            tokens = shape[1]
            logsumexp = logsumexp[..., :tokens]
            found = bias_gradient(qkv, grad, out, logsumexp, folded, ctx.bounds, ctx.runs, ctx.scale)
            grad_bias = F.pad(found.to(dtype), (0, shape[2] - tokens))
        return grad_qkv, grad_bias, None, None, None, None


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _aligned(qkv: torch.Tensor) -> torch.Tensor:
    """Pad the width of the heads, for the kernel, with zeros, which change no score. Aligned heads are not copied."""
    missing = -qkv.shape[-1] % (ALIGNMENT // qkv.element_size())
    return (F.pad(qkv, (0, missing)) if missing else qkv).contiguous()


@torch.compiler.disable  # a graph break under torch.compile: operations that are not part of PyTorch's public interface
def fused_attention(qkv: torch.Tensor, bias: torch.Tensor, plan: WindowPlan, scale: float) -> torch.Tensor:
    """Compute attention within windows on a GPU, differentiable in ``qkv`` and ``bias``.

    Args:
        qkv: (windows, tokens, 3, heads, width).
        bias: (heads, tokens, tokens + padding to a multiple of 8), the same for every window.
        plan: the windows.
        scale: factor of the scores.

    Returns:
        (windows, tokens, heads x width).
    """
    width = qkv.shape[-1]
    if has_efficient_kernel(qkv.device, qkv.dtype):
        out = _FusedAttention.apply(_aligned(qkv), bias, plan.masks, plan.bounds, plan.runs, scale)
        return out[..., :width].flatten(-2)
    return attend_by_formula(qkv, fold(bias, plan.masks, qkv.dtype), plan.runs, scale)


@torch.compiler.disable
def fused_inference(qkv: torch.Tensor, folded: torch.Tensor, runs: tuple, scale: float) -> torch.Tensor:
    """Compute attention within windows on a GPU without gradients.

    Args:
        qkv: (windows, tokens, 3, heads, width).
        folded: (kinds, heads, tokens, tokens) of `fold`.
        runs: `WindowPlan.runs`.
        scale: factor of the scores.

    Returns:
        (windows, tokens, heads x width).
    """
    if not has_efficient_kernel(qkv.device, qkv.dtype):
        return attend_by_formula(qkv, folded, runs, scale)
    width, qkv = qkv.shape[-1], _aligned(qkv)
    out = _joined([attend(qkv[a:b], folded[kind], scale, for_backward=False)[0] for kind, a, b in runs])
    return out[..., :width].flatten(-2)


def attend_by_formula(qkv: torch.Tensor, folded: torch.Tensor, runs: tuple, scale: float) -> torch.Tensor:
    """Compute the same where the kernel does not: in float64, in bfloat16 on an old card, on cards of other makers.

    Differentiable in ``qkv`` and ``folded``; the scores of the windows of a kind are stored.
    """
    parts = []
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for kind, a, b in runs:
            q, k, v = qkv[a:b].permute(2, 0, 3, 1, 4)
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=folded[kind][None], scale=scale))
    return _joined(parts).transpose(1, 2).flatten(-2)
