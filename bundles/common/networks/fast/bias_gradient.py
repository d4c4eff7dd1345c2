# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The gradient of the attention bias, which all windows share, without a table of scores for all windows.

PyTorch's fused kernel writes it for every window, windows x heads x tokens x tokens, before it is summed: for four
crops of 96^3 in bf16, 1 GB in each block of the first stage. Here the scores are computed again from the saved
logsumexp and summed at once: by a Triton kernel, or else a few windows at a time in PyTorch.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

CHUNK = 2**25  # scores in memory at a time without the kernel: 128 MiB in float32


def bias_gradient(
    qkv: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    folded: torch.Tensor,
    bounds: torch.Tensor,
    runs: tuple,
    scale: float,
) -> torch.Tensor:
    """Compute the gradient of a bias that all windows share: the sum over windows of P (dP - sum of P dP).

    Args:
        qkv: (windows, tokens, 3, heads, width), contiguous.
        grad: (windows, tokens, heads, width), contiguous, gradient of the output in the dtype of ``qkv``.
        out: (windows, tokens, heads, width), the output.
        logsumexp: (windows, heads, tokens) float32, of the scores; only its rows may be padded.
        folded: (kinds, heads, tokens, tokens), bias plus mask in the dtype of ``qkv``; only its rows may be padded.
        bounds: `WindowPlan.bounds`.
        runs: `WindowPlan.runs`.
        scale: factor of the scores.

    Returns:
        (heads, tokens, tokens) in float32 or wider.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    delta = (grad.to(wide) * out).sum(dim=-1).transpose(1, 2).contiguous()
    reason = why_no_kernel(qkv.device, qkv.dtype, qkv.shape[-1])
    if reason is None:
        from .bias_gradient_kernel import bias_gradient_by_kernel

        return bias_gradient_by_kernel(qkv, grad, logsumexp, delta, folded, bounds, scale)
    _tell(reason)
    return _by_chunks(qkv, grad, logsumexp, delta, folded, runs, scale)


def _by_chunks(
    qkv: torch.Tensor,
    grad: torch.Tensor,
    logsumexp: torch.Tensor,
    delta: torch.Tensor,
    folded: torch.Tensor,
    runs: tuple,
    scale: float,
) -> torch.Tensor:
    tokens, _, heads = qkv.shape[1:4]
    total = torch.zeros(heads, tokens, tokens, dtype=delta.dtype, device=qkv.device)
    step = max(1, CHUNK // (heads * tokens * tokens))
    with torch.autocast(qkv.device.type, enabled=False):
        for kind, first, last in runs:
            bias = folded[kind].to(total.dtype)
            for start in range(first, last, step):
                part = slice(start, min(start + step, last))
                q, k, v = qkv[part].to(total.dtype).permute(2, 0, 3, 1, 4)
                p = torch.matmul(q, k.transpose(-1, -2)).mul_(scale).add_(bias)
                p.sub_(logsumexp[part, :, :, None]).exp_()
                slope = torch.matmul(grad[part].transpose(1, 2).to(total.dtype), v.transpose(-1, -2))
                total += slope.sub_(delta[part, :, :, None]).mul_(p).sum(dim=0)
    return total


@lru_cache(maxsize=64)
def why_no_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Return why the Triton kernel cannot be used for heads of this width; None if it can."""
    if device.type != "cuda":
        return f"it is for GPUs, not for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "this Python has no Triton (pip install triton)"
    from .bias_gradient_kernel import LARGEST_WIDTH, build

    if width > LARGEST_WIDTH:
        return f"it takes heads of up to {LARGEST_WIDTH} channels, and these have {width}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not compute in {str(dtype).removeprefix('torch.')}"
    try:  # Triton builds the kernel when it is first called: it needs a C compiler and a recent driver
        build(device, dtype, width)
    except torch.OutOfMemoryError:  # says nothing about the kernel, and must not be remembered
        raise
    except Exception as error:  # whatever Triton, its compiler or the driver raises; an error of the card comes again
        return f"Triton cannot build it here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


@lru_cache(maxsize=64)
def _tell(reason: str) -> None:
    """Log a reason once."""
    logger.warning(
        "The gradient of the attention bias is computed by PyTorch, more slowly, not by the Triton kernel: %s.", reason
    )
