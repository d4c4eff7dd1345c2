# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Swin window attention that does not store the attention scores, with MONAI's weights, names and results.

MONAI's `WindowAttention` writes windows x heads x tokens x tokens scores several times and keeps them for the backward.
Here

- on a GPU, `fused_attention` uses PyTorch's memory-efficient kernel, and one of our own for the gradient of the bias;
- on a CPU, `scaled_dot_product_attention` would keep all scores if the bias needs a gradient. So `chunked_attention`
  processes a few windows at a time and recomputes the scores in the backward;
- while a network is traced or exported, MONAI's own operations run.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets.swin_unetr import WindowAttention
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .fused_attention import fold, fused_attention, fused_inference
from .windows import WindowPlan

CHUNK = 2**21  # scores in memory at a time on a CPU: they should fit in its cache


def is_exporting() -> bool:
    """Return whether a network is being traced or exported, which needs plain operations and no caches."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


def _no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


class _ChunkedAttention(torch.autograd.Function):
    """softmax(scale q k^T + bias + mask) v, a few windows at a time; the scores of all windows are never stored.

    Scores are computed in float32 or wider, for any dtype of the queries.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, bias: torch.Tensor, masks: torch.Tensor | None, runs: tuple, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.masks, ctx.runs, ctx.scale = masks, runs, scale
        bias = bias.detach()
        folded = bias[None] if masks is None else bias + masks[:, None].to(bias.dtype)
        return attend_by_kind(qkv, folded, runs, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        qkv, bias = ctx.saved_tensors
        needs_qkv, needs_bias = ctx.needs_input_grad[:2]
        windows, tokens, _, heads, width = qkv.shape
        wide = torch.promote_types(qkv.dtype, torch.float32)
        bias = bias.to(wide)
        # few large operations: on shared cores, each parallel region may wait for a sleeping thread
        q, k, v = qkv.permute(2, 0, 3, 1, 4).to(wide).contiguous()  # (windows, heads, tokens, width)
        q.mul_(ctx.scale)
        grad = grad.view(windows, tokens, heads, width).transpose(1, 2).to(wide).contiguous()
        grad_qkv = torch.empty((3, *q.shape), dtype=wide) if needs_qkv else None
        grad_bias = torch.zeros(bias.shape, dtype=wide) if needs_bias else None
        step = min(windows, max(1, CHUNK // (heads * tokens * tokens)))
        scores = torch.empty(step, heads, tokens, tokens, dtype=wide)
        slopes = torch.empty_like(scores)
        for kind, first, last in ctx.runs:
            offset = bias if ctx.masks is None else bias + ctx.masks[kind].to(wide)
            for start in range(first, last, step):
                part = slice(start, min(start + step, last))
                qc, kc, vc, gc = (t[part].flatten(0, 1) for t in (q, k, v, grad))
                p = scores[: part.stop - part.start].copy_(offset).flatten(0, 1).baddbmm_(qc, kc.transpose(1, 2))
                torch.softmax(p, dim=-1, out=p)
                ds = torch.bmm(gc, vc.transpose(1, 2), out=slopes[: part.stop - part.start].flatten(0, 1))
                torch._softmax_backward_data(ds, p, -1, wide, grad_input=ds)
                if needs_bias:
                    grad_bias.add_(ds.unflatten(0, (-1, heads)).sum(dim=0))
                if needs_qkv:
                    dq, dk, dv = grad_qkv[:, part].flatten(1, 2)
                    torch.bmm(ds, kc, out=dq)
                    torch.bmm(ds.transpose(1, 2), qc, out=dk)
                    torch.bmm(p.transpose(1, 2), gc, out=dv)
        if needs_qkv:
            grad_qkv[0].mul_(ctx.scale)
            grad_qkv = grad_qkv.permute(1, 3, 0, 2, 4).to(qkv.dtype)
        return grad_qkv, grad_bias, None, None, None


def attend_by_kind(qkv: torch.Tensor, folded: torch.Tensor, runs: tuple, scale: float) -> torch.Tensor:
    """Compute attention for all windows of one kind at a time, so that the CPU's flash kernel reads a single bias.

    Args:
        qkv: (windows, tokens, 3, heads, width).
        folded: (kinds, heads, tokens, tokens), bias plus mask, without a gradient.
        runs: `WindowPlan.runs`.
        scale: factor of the scores.

    Returns:
        (windows, tokens, heads x width).
    """
    windows, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(windows, tokens, heads, width)
    for kind, first, last in runs:
        q, k, v = qkv[first:last].permute(2, 0, 3, 1, 4)
        bias = folded[kind].to(qkv.dtype)[None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        out[first:last] = attended.transpose(1, 2)
    return out.flatten(-2)


@torch.compiler.disable  # do not unroll the loop over windows: a graph break under torch.compile, on CPUs only
def chunked_attention(
    qkv: torch.Tensor, bias: torch.Tensor, masks: torch.Tensor | None, runs: tuple, scale: float
) -> torch.Tensor:
    """Compute attention within windows on a CPU, differentiable in ``qkv`` and ``bias``.

    Args:
        qkv: (windows, tokens, 3, heads, width).
        bias: (heads, tokens, tokens), the same for every window.
        masks: (kinds, tokens, tokens) or None.
        runs: `WindowPlan.runs`.
        scale: factor of the scores.

    Returns:
        (windows, tokens, heads x width).
    """
    with _no_autocast():
        return _ChunkedAttention.apply(qkv, bias, masks, runs, scale)


class FastWindowAttention(WindowAttention):
    """MONAI's `WindowAttention` without stored attention scores.

    ``forward`` also accepts a `WindowPlan` instead of the mask; the windows must then be in the plan's order. With a
    mask of MONAI's shape, with attention dropout, or during export, MONAI's own forward runs.
    """

    _kept: tuple | None = None  # (key, folded bias, ...) of the last forward without gradients

    def forward(self, x: torch.Tensor, mask: WindowPlan | torch.Tensor | None) -> torch.Tensor:
        drops = self.training and self.attn_drop.p > 0
        if not isinstance(mask, WindowPlan) or drops or is_exporting():
            return super().forward(x, mask.dense_mask() if isinstance(mask, WindowPlan) else mask)
        tokens, channels = x.shape[1:]
        qkv = self.qkv(x).view(-1, tokens, 3, self.num_heads, channels // self.num_heads)
        if not torch.is_grad_enabled():
            folded = self._folded_once(mask, tokens, qkv.dtype)
            if x.device.type == "cpu":
                x = attend_by_kind(qkv, folded, mask.runs, self.scale)
            else:
                x = fused_inference(qkv, folded, mask.runs, self.scale)
        else:
            self._kept = None
            bias = self.position_bias(tokens)
            if x.device.type == "cpu":
                x = chunked_attention(qkv, bias[..., :tokens], mask.masks, mask.runs, self.scale)
            else:
                x = fused_attention(qkv, bias, mask, self.scale)
        return self.proj_drop(self.proj(x))

    def position_bias(self, tokens: int) -> torch.Tensor:
        """Return the learned bias of each pair of tokens, (heads, tokens, tokens + padding to a multiple of 8).

        A window with fewer tokens than the full one reads the corner of the full window's index. That is not the index
        of the smaller window, but every published checkpoint was trained this way.
        """
        index = F.pad(self.relative_position_index[:tokens, :tokens], (0, -tokens % 8))
        bias = self.relative_position_bias_table[index.flatten()].view(*index.shape, self.num_heads)
        return bias.permute(2, 0, 1).contiguous()

    def _folded_once(self, plan: WindowPlan, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Fold bias and masks; reuse the last result unless weights, shape or dtype have changed."""
        table = self.relative_position_bias_table
        if torch.compiler.is_compiling() or table.is_inference():
            return fold(self.position_bias(tokens), plan.masks, dtype)
        masks = None if plan.masks is None else id(plan.masks)
        key = (table._version, table.data_ptr(), table.device, table.dtype, dtype, tokens, masks)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                folded = fold(self.position_bias(tokens), plan.masks, dtype)
            # keep references to table and masks, so that no other tensor can get the same address
            self._kept = (key, folded, table.detach(), plan.masks)
        return self._kept[1]

    def train(self, mode: bool = True) -> FastWindowAttention:
        # Some writes do not change the tensor's version (fused optimisers, `.data`). A switch between training and
        # inference calls train() or eval(), which comes here.
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}
