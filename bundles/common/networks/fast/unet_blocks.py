# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Faster convolutional blocks of MONAI's Swin UNETR on a CPU: channels-last, with norms and activations in place.

On a GPU, and while a network is traced or exported, MONAI's own forward runs.
"""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.nets import SwinUNETR
from torch import nn
from torch.nn import functional as F

from .attention import is_exporting
from .norm_act import norm_act, residual_norm_act


def pointwise(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """Compute a 1x1x1 convolution as a matrix product, channels-last in and out."""
    return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)


def can_fuse(x: torch.Tensor, norm: nn.Module, act: nn.Module) -> bool:
    """Return whether the fused path applies.

    It does on a CPU, for a leaky ReLU after an instance norm without weights and running statistics, as MONAI builds
    it.
    """
    plain = type(norm) is nn.InstanceNorm3d and not norm.affine and not norm.track_running_stats
    return (
        x.device.type == "cpu" and plain and type(act) is nn.LeakyReLU and act.negative_slope > 0 and not is_exporting()
    )


def conv_norm_act(conv: nn.Module, norm: nn.Module, act: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return ``act(norm(conv(x)))``, computed in the memory of the convolution's output."""
    if not can_fuse(x, norm, act):
        return act(norm(conv(x)))
    x = conv(x.contiguous(memory_format=torch.channels_last_3d))
    if x.shape[2:].numel() == 1:  # the error and the message of `torch.nn.functional.instance_norm`
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.size()}")
    return norm_act(x, slope=act.negative_slope, eps=norm.eps)


class FastUnetResBlock(UnetResBlock):
    """Two convolutions with a residual connection."""

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        if not can_fuse(inp, self.norm1, self.lrelu):
            return super().forward(inp)
        inp = inp.contiguous(memory_format=torch.channels_last_3d)
        out = self.conv2(conv_norm_act(self.conv1, self.norm1, self.lrelu, inp))
        residual = inp
        if self.downsample:
            conv = self.conv3.conv
            residual = pointwise(conv, inp) if set(conv.stride) == {1} else self.conv3(inp)
        slope, eps = self.lrelu.negative_slope, self.norm2.eps
        return residual_norm_act(out, residual, norm_residual=self.downsample, slope=slope, eps=eps)


class FastUnetOutBlock(UnetOutBlock):
    """The last convolution, 1x1x1. Its result is contiguous, because losses and metrics read it with the labels."""

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        if is_exporting() or inp.device.type != "cpu":
            return super().forward(inp)
        return pointwise(self.conv.conv, inp).contiguous()


class FastSwinUNETR(SwinUNETR):
    """The whole network. A MetaTensor is converted to a plain tensor for the forward, and back at the end."""

    def forward(self, x_in: torch.Tensor) -> torch.Tensor:
        if is_exporting() or not isinstance(x_in, MetaTensor):
            return super().forward(x_in)
        return MetaTensor(super().forward(x_in.as_tensor())).copy_meta_from(x_in)
