# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The gradient of the attention bias on a GPU, by a Triton kernel that stores no scores. Importing it needs Triton.

Each program computes one tile of a head's (tokens, tokens) gradient. It goes through the windows, computes the tile's
probabilities again from the saved logsumexp, and adds up in registers. It stores once and uses no atomic additions, so
two runs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_WIDTH = 64  # width of a head; wider tiles would not fit into the shared memory of smaller cards
PROGRAMS = 1024  # if heads and tiles are fewer, the windows are divided: about 8 programs for each multiprocessor
LARGEST_SPLIT = 8  # partial sums per tile at most: their memory stays small
LEAST_WINDOWS = 32  # windows of a program


@triton.jit
def _sum_over_windows(
    qkv,  # (windows, tokens, 3, heads, width), contiguous
    grad,  # (windows, tokens, heads, width), contiguous
    logsumexp,  # (windows, heads, tokens), rows `sums` apart
    delta,  # (windows, heads, tokens), contiguous: sum of output x gradient over the width
    folded,  # (kinds, heads, tokens, tokens), rows `row` apart
    bounds,  # (kinds + 1,) first window of each kind, and the number of windows
    out,  # (splits, heads, tokens, tokens)
    scale,
    row,
    sums,
    windows,
    kinds,
    heads,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(TOKENS, BLOCK)
    tile, head = tl.program_id(0), tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    i = (tile // tiles) * BLOCK + tl.arange(0, BLOCK)  # queries
    j = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)  # keys
    d = tl.arange(0, BLOCK_WIDTH)
    inside = (i < TOKENS)[:, None] & (j < TOKENS)[None, :]
    at_i = (i < TOKENS)[:, None] & (d < WIDTH)[None, :]
    at_j = (j < TOKENS)[:, None] & (d < WIDTH)[None, :]
    low, high = windows * split // SPLITS, windows * (split + 1) // SPLITS
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for kind in range(kinds):
        of_bias = (kind * heads + head) * TOKENS * row + i[:, None] * row + j[None, :]
        bias = tl.load(folded + of_bias, mask=inside, other=float("-inf")).to(tl.float32)
        first, last = tl.maximum(tl.load(bounds + kind), low), tl.minimum(tl.load(bounds + kind + 1), high)
        of_i, of_j = (first * TOKENS + i).to(tl.int64)[:, None], (first * TOKENS + j).to(tl.int64)[:, None]
        q_at = qkv + (of_i * 3 * heads + head) * WIDTH + d[None, :]
        k_at = qkv + ((of_j * 3 + 1) * heads + head) * WIDTH + d[None, :]
        v_at = qkv + ((of_j * 3 + 2) * heads + head) * WIDTH + d[None, :]
        g_at = grad + (of_i * heads + head) * WIDTH + d[None, :]
        of_sums = (first * heads + head).to(tl.int64)
        log_sum_at, delta_at = logsumexp + of_sums * sums + i, delta + of_sums * TOKENS + i
        for _ in range(first, last):
            q = tl.load(q_at, mask=at_i, other=0.0)
            k = tl.load(k_at, mask=at_j, other=0.0)
            v = tl.load(v_at, mask=at_j, other=0.0)
            g = tl.load(g_at, mask=at_i, other=0.0)
            log_sum = tl.load(log_sum_at, mask=i < TOKENS, other=0.0)
            mean = tl.load(delta_at, mask=i < TOKENS, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
            p = tl.exp(scores - log_sum[:, None])
            total += p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])
            q_at += 3 * TOKENS * heads * WIDTH
            k_at += 3 * TOKENS * heads * WIDTH
            v_at += 3 * TOKENS * heads * WIDTH
            g_at += TOKENS * heads * WIDTH
            log_sum_at += heads * sums
            delta_at += heads * TOKENS
    of_out = (split * heads + head) * TOKENS * TOKENS + i[:, None] * TOKENS + j[None, :]
    tl.store(out + of_out, total, mask=inside)


def splits_of(*, windows: int, programs: int) -> int:
    """Return how many parts the windows are divided into. It depends only on the shape, never on the card."""
    return max(1, min(PROGRAMS // programs, LARGEST_SPLIT, windows // LEAST_WINDOWS))


def bias_gradient_by_kernel(
    qkv: torch.Tensor,
    grad: torch.Tensor,
    logsumexp: torch.Tensor,
    delta: torch.Tensor,
    folded: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute what `bias_gradient.bias_gradient` returns, from contiguous tensors.

    Args:
        qkv: (windows, tokens, 3, heads, width).
        grad: (windows, tokens, heads, width), gradient of the output in the dtype of ``qkv``.
        logsumexp: (windows, heads, tokens) float32, of the scores; only its rows may be padded.
        delta: (windows, heads, tokens) float32, sum of output x gradient over the width.
        folded: (kinds, heads, tokens, tokens), bias plus mask in the dtype of ``qkv``; only its rows may be padded.
        bounds: (kinds + 1,) int32, first window of each kind, and the number of windows.
        scale: factor of the scores.

    Returns:
        (heads, tokens, tokens) float32.
    """
    windows, tokens, _, heads, width = qkv.shape
    block = 32 if qkv.dtype == torch.float32 else 64
    tiles = triton.cdiv(tokens, block) ** 2
    splits = splits_of(windows=windows, programs=tiles * heads)
    out = torch.empty(splits, heads, tokens, tokens, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):  # Triton launches on the current GPU
        _sum_over_windows[tiles, heads * splits](
            *(qkv, grad, logsumexp, delta, folded, bounds, out, scale),
            row=folded.stride(2),
            sums=logsumexp.stride(1),
            windows=windows,
            kinds=len(folded),
            heads=heads,
            TOKENS=tokens,
            WIDTH=width,
            SPLITS=splits,
            BLOCK=block,
            BLOCK_WIDTH=max(16, triton.next_power_of_2(width)),
            num_warps=4,
            num_stages=2,
        )
    return out[0] if splits == 1 else out.sum(dim=0)


def build(device: torch.device, dtype: torch.dtype, width: int) -> torch.Tensor:
    """Compute the gradient for one window of 16 tokens and one head, all zeros: Triton raises if it cannot build it."""
    qkv = torch.zeros(1, 16, 3, 1, width, dtype=dtype, device=device)
    sums, bias = torch.zeros(1, 1, 16, device=device), torch.zeros(1, 1, 16, 16, dtype=dtype, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    return bias_gradient_by_kernel(qkv, qkv[:, :, 0].contiguous(), sums, sums, bias, bounds, 1.0)
