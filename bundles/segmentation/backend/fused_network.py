# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A copy of Swin UNETR that is traced with few operations: attention is one fused operation for each kind of windows.

MONAI's own operations, which exports to ONNX and TorchScript take, store the scores of all windows, and a mask of each
shifted window becomes a constant: 160 MB in the first stage at 96^3. Windows differ in at most 2^3 masks (see
`window_plan`), so here a shifted block has at most eight fused operations, for any number of windows.
"""

from __future__ import annotations

import copy

import torch
from monai.networks.nets.swin_unetr import get_window_size
from torch import nn
from torch.nn import functional as F

from ...common.networks.fast.attention import FastWindowAttention, fold
from ...common.networks.fast.swin import FastSwinTransformerBlock, make_fast
from ...common.networks.fast.windows import WindowPlan, export_from_windows, export_to_windows, window_plan


class FusedWindowAttention(FastWindowAttention):
    """`FastWindowAttention` of one sample, without branches: bias and masks become constants of the trace."""

    def forward(self, x: torch.Tensor, mask: WindowPlan) -> torch.Tensor:
        """Map windows (windows, tokens, C), in the order of the plan, to the same shape."""
        windows, tokens, channels = mask.windows, int(x.shape[1]), self.dim
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        folded = fold(self.position_bias(tokens), mask.masks, torch.float32)
        lengths = [last - first for _, first, last in mask.runs]
        attended = [
            F.scaled_dot_product_attention(*parts, attn_mask=_constant(folded[kind][None]), scale=self.scale)
            for (kind, _, _), *parts in zip(mask.runs, *(part.split(lengths) for part in (q, k, v)), strict=True)
        ]
        attended = torch.cat(attended) if len(attended) > 1 else attended[0]
        return self.proj(attended.transpose(1, 2).reshape(windows, tokens, channels))


class FusedSwinTransformerBlock(FastSwinTransformerBlock):
    """`FastSwinTransformerBlock` with the plan of its windows as constants of the trace."""

    def forward_part1(self, x: torch.Tensor, mask_matrix: torch.Tensor | None) -> torch.Tensor:
        grid = tuple(int(size) for size in x.shape[1:-1])
        window, shift = get_window_size(grid, self.window_size, self.shift_size)
        plan = window_plan(grid, window, shift, x.device)
        if len(plan.padding):
            real = torch.ones(len(plan.take), 1).index_fill_(0, plan.padding, 0)
            plan = plan._replace(real=_constant(real))
        return export_from_windows(self.attn(export_to_windows(self.norm1(x), plan), plan), plan, grid)


FUSED = {FastWindowAttention: FusedWindowAttention, FastSwinTransformerBlock: FusedSwinTransformerBlock}


def fused_copy(network: nn.Module) -> nn.Module:
    """Return a copy of MONAI's or the fast Swin UNETR, for tracing with one window; its results are the same."""
    copied = make_fast(copy.deepcopy(network)).eval().requires_grad_(False)
    for module in copied.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
    return copied


def _constant(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers without the operations that computed them, so that a trace keeps the numbers."""
    return torch.from_numpy(tensor.detach().cpu().numpy().copy())
