# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make MONAI's Swin UNETR, or its encoder alone, faster: same modules, parameters and results, different forwards.

`make_fast` changes the class of the modules of a stock network, as PyTorch's lazy modules do. Constructors, initial
weights, names, hooks and state dicts remain MONAI's. Tokens stay in channels-last order from the patch embedding to the
last stage. While a network is traced or exported, plain operations run that every exporter knows.
"""

from __future__ import annotations

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.nets.swin_unetr import (
    BasicLayer,
    SwinTransformer,
    SwinTransformerBlock,
    SwinUNETR,
    WindowAttention,
    get_window_size,
)
from torch import nn
from torch.nn import functional as F

from .attention import FastWindowAttention, is_exporting
from .unet_blocks import FastSwinUNETR, FastUnetOutBlock, FastUnetResBlock
from .windows import (
    WindowPlan,
    export_from_windows,
    export_plan,
    export_to_windows,
    from_windows,
    to_windows,
    window_plan,
)


@torch.compiler.disable  # under torch.compile, a graph break: the cached plan is used and not traced
def _plan(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], x: torch.Tensor) -> WindowPlan:
    """Return the plan for the tokens ``x``; a plan of fake tensors (operation counters) is not cached."""
    plan_of = window_plan if type(x) is torch.Tensor else window_plan.__wrapped__
    return plan_of(grid, window, shift, x.device, len(x))


class FastSwinTransformerBlock(SwinTransformerBlock):
    """Attention and MLP with residuals on tokens (B, D, H, W, C). The block computes its own masks."""

    def forward_part1(self, x: torch.Tensor, mask_matrix: torch.Tensor | None) -> torch.Tensor:
        grid = tuple(int(size) for size in x.shape[1:-1])
        window, shift = get_window_size(grid, self.window_size, self.shift_size)
        if is_exporting():  # MONAI's rolls by 0 along an axis lose the shape in ONNX
            plan = export_plan(grid, window, shift, x.device)
            return export_from_windows(self.attn(export_to_windows(self.norm1(x), plan), plan), plan, grid)
        plan = _plan(grid, window, shift, x)
        windows = self.attn(to_windows(self.norm1(x), plan), plan)
        return from_windows(windows, plan, grid)


class FastBasicLayer(BasicLayer):
    """The blocks of a stage and its patch merging: (B, C, D, H, W) in and out, both channels-last in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = range(2, x.ndim)  # permute, not movedim, whose -1 ONNX does not know
        x = x.permute(0, *axes, 1).contiguous()
        for block in self.blocks:
            x = block(x, None)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


class FastSwinTransformer(SwinTransformer):
    """The whole encoder. `deepest` skips the outputs that only a decoder needs."""

    def proj_out(self, x: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        if is_exporting() or not normalize:
            return super().proj_out(x, normalize)
        return F.layer_norm(x.movedim(1, -1), [x.shape[1]]).movedim(-1, 1)

    def _stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of the patch embedding and the four stages, not normalised."""
        x = x.as_subclass(torch.Tensor)  # a MetaTensor would copy its metadata in each of thousands of operations
        x = self.pos_drop(self.patch_embed(x))
        outputs = [x]
        for stage in ("1", "2", "3", "4"):
            if self.use_v2:
                x = getattr(self, f"layers{stage}c")[0](x.contiguous())
            x = getattr(self, f"layers{stage}")[0](x)
            outputs.append(x)
        return outputs

    def forward(self, x: torch.Tensor, normalize: bool = True) -> list[torch.Tensor]:
        if is_exporting():
            return super().forward(x, normalize)
        return [self.proj_out(output, normalize) for output in self._stages(x)]

    def deepest(self, x: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Return only the last of the five outputs of ``forward``, (B, 16 x feature size, X/32, Y/32, Z/32)."""
        return self.proj_out(self._stages(x)[-1], normalize)


FAST = {
    WindowAttention: FastWindowAttention,
    SwinTransformerBlock: FastSwinTransformerBlock,
    BasicLayer: FastBasicLayer,
    SwinTransformer: FastSwinTransformer,
    UnetResBlock: FastUnetResBlock,
    UnetOutBlock: FastUnetOutBlock,
    SwinUNETR: FastSwinUNETR,
}


def make_fast(network: nn.Module) -> nn.Module:
    """Give every module of MONAI's Swin UNETR within ``network`` its fast class, in place; return the network."""
    for module in network.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
    return network
