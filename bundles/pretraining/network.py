# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The network that is pre-trained: a Swin encoder and one head per proxy task.

Parameter names are those of the official pre-training checkpoints (``swinViT``, ``rotation_head``, ``contrastive_head``, ``conv``), so
that one can be continued and the encoder fits MONAI's `SwinUNETR`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.errors import InputError
from ..common.networks.fast.swin import FastSwinTransformer
from ..common.networks.fast.unet_blocks import conv_norm_act
from ..common.networks.swin_unetr import build_encoder
from ..common.weights.dialects import find_weights
from .proxy_tasks.losses import TASKS, check_tasks

EMBEDDING = 512  # length of the contrastive embedding (paper.md: 512-d linear projection)


def _vae_head(channels: int, out_channels: int) -> nn.Sequential:
    """Five times convolution, instance norm, leaky ReLU and trilinear doubling, then a 1x1x1 convolution (official default)."""
    layers: list[nn.Module] = []
    widths = [channels, channels // 2, channels // 4, channels // 8, channels // 16, channels // 16]
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [  # in fours, which _EarlyProjection goes by
            nn.Conv3d(width_in, width_out, kernel_size=3, padding=1),
            nn.InstanceNorm3d(width_out),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
        ]
    return nn.Sequential(*layers, nn.Conv3d(widths[-1], out_channels, kernel_size=1))


class _EarlyProjection(nn.Sequential):
    """`_vae_head` with its last convolution before its last doubling, on an eighth of the voxels.

    Both are linear and act apart, one on channels, one on space, and the weights of an interpolation add up to 1, so that the bias is
    the same before and after: equal results.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *layers, project = self
        for conv, norm, act, double in zip(*[iter(layers)] * 4, strict=True):
            x = conv_norm_act(conv, norm, act, x)
            x = double(project(x) if double is layers[-1] else x)
        return x


def _deconv_head(channels: int, out_channels: int) -> nn.Sequential:
    """Five transposed convolutions that double the resolution each."""
    widths = [channels, channels // 2, channels // 4, channels // 8, channels // 16, out_channels]
    return nn.Sequential(
        *(nn.ConvTranspose3d(a, b, kernel_size=2, stride=2) for a, b in zip(widths[:-1], widths[1:], strict=True))
    )


def _large_kernel_deconv_head(channels: int, out_channels: int) -> nn.Module:
    """One transposed convolution of kernel and stride 32, the paper's wording."""
    return nn.ConvTranspose3d(channels, out_channels, kernel_size=32, stride=32)


RECONSTRUCTION_HEADS = {"vae": _vae_head, "deconv": _deconv_head, "large_kernel_deconv": _large_kernel_deconv_head}
POOLINGS = ("token", "mean")
OFFICIAL_HEADS = {"reconstruction_head": "vae", "pooling": "token"}


def resolve_heads(
    *,
    asked: Mapping[str, Any],
    checkpoint: str | None,
    preset: Mapping[str, Any] = OFFICIAL_HEADS,
    optional: bool = False,
) -> dict[str, str]:
    """What the user asked for, else what the checkpoint was trained with, else the preset's choice.

    ``pooling`` leaves no trace in the weights, so a checkpoint read with another one would be wrong without a word.

    Args:
        asked: ``reconstruction_head`` and ``pooling``, None where left open.
        checkpoint: ``model.pt`` of this bundle, or None.
        preset: values of the preset.
        optional: ignore a checkpoint file that does not exist (yet), as ``verify_net_in_out`` needs it.

    Raises:
        InputError: if the checkpoint was trained with something else than what was asked for.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    known = checkpoint is not None and (Path(checkpoint).exists() or not optional)
    held = dict(read_model(str(checkpoint))["heads"]) if known else {}
    for name, value in asked.items():
        if held.get(name, value) != value:
            raise InputError(f"{checkpoint} was trained with {name} {held[name]}, not {value}. Leave --{name} out.")
    return {name: str({**preset, **held, **asked}[name]) for name in OFFICIAL_HEADS}


def read_model(checkpoint: str) -> dict[str, Any]:
    """What the file of a whole pre-training network says of itself: ``heads``, ``tasks`` and ``trained``, which an evaluation goes by.

    An official checkpoint with its heads says it by the names of its tensors: all tasks, corner voxels, and one of three reconstruction heads.

    Raises:
        InputError: if the file is something else, such as an ``encoder.pt``, which has no heads.
    """
    found = find_weights(checkpoint)
    if {"heads", "tasks"} <= set(found.content):
        return {"trained": {}, **found.content}
    heads = {"conv.20.weight": "vae", "conv.4.weight": "deconv", "conv.weight": "large_kernel_deconv"}
    reconstruction = next((head for name, head in heads.items() if name in found.rest), None)
    if reconstruction is None or not {"rotation_head.weight", "contrastive_head.weight"} <= set(found.rest):
        raise InputError(
            f"{checkpoint} is not a whole pre-training network (encoder and heads). Give the model.pt beside its encoder.pt, or for a start "
            "from an encoder alone --pretrained_encoder."
        )
    return {
        "heads": {**OFFICIAL_HEADS, "reconstruction_head": reconstruction},
        "tasks": list(TASKS),
        "trained": {"seed": 0},
    }


# Of a file that does not say it: what train.yaml has unless told otherwise.
UNTOLD = {
    "foreground_hu": -500.0,
    "hu_window": [-1000.0, 1000.0],
    "crops_per_volume": 2,
    "min_body": 0.01,
    "mask_block": [0.05, 0.25],
    "temperature": 0.5,
    "masked_only": False,
    "task_weights": {},
}


def values_of_training(*, trained: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for an evaluation: those of the training where the file says them, else the preset's, else those of train.yaml.

    Args:
        trained: from `read_model`.
        preset: values of the preset.
    """
    return {**UNTOLD, **preset, **trained["trained"]}


class SwinPretrainer(nn.Module):
    """Swin encoder with heads for rotation, contrast and reconstruction.

    In training mode a forward returns a dict of the heads in use: ``rotation`` (B, 4), ``contrast`` (B, 512) and ``inpainting`` (B, C, X, Y, Z).
    In eval mode it returns the reconstruction alone, one tensor, as the model zoo's verifier wants.

    Args:
        encoder: encoder record (`common.swin_encoder`).
        tasks: proxy tasks whose heads run; heads of other tasks exist, but are frozen.
        heads: ``reconstruction_head`` (``vae``, ``deconv`` or ``large_kernel_deconv``) and ``pooling``, what rotation and contrast
            read: ``token``, bottleneck voxels 0 and 1 (official code), or ``mean`` over the bottleneck.
        use_checkpoint: gradient checkpointing of the encoder.
        fast: the same results with less time and memory; False: stock MONAI and the official order of layers.

    Raises:
        InputError: for an unknown head, pooling or task.
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        tasks: Sequence[str],
        heads: Mapping[str, str] = OFFICIAL_HEADS,
        use_checkpoint: bool = False,
        fast: bool = True,
    ) -> None:
        super().__init__()
        for name, known in (("reconstruction_head", RECONSTRUCTION_HEADS), ("pooling", POOLINGS)):
            if heads[name] not in known:
                raise InputError(f"--{name} {heads[name]!r} is not one of {', '.join(known)}.")
        self.tasks = check_tasks(tasks)
        self.pooling = heads["pooling"]
        channels = 16 * encoder["feature_size"]
        self.swinViT = build_encoder(encoder, use_checkpoint=use_checkpoint, fast=fast)
        self.rotation_head = nn.Linear(channels, 4)
        self.contrastive_head = nn.Linear(channels, EMBEDDING)
        self.conv = RECONSTRUCTION_HEADS[heads["reconstruction_head"]](channels, encoder["in_channels"])
        if fast and heads["reconstruction_head"] == "vae":
            self.conv = _EarlyProjection(*self.conv)
        task_heads = {"rotation": self.rotation_head, "contrast": self.contrastive_head, "inpainting": self.conv}
        for task, head in task_heads.items():
            head.requires_grad_(task in self.tasks)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """Encoder output at 1/32 of the resolution: (B, 16 x feature_size, X/32, Y/32, Z/32)."""
        if isinstance(self.swinViT, FastSwinTransformer):
            return self.swinViT.deepest(x)
        return self.swinViT(x.contiguous())[4]

    def embedding(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of the bottleneck over space, (B, 16 x feature_size): one vector per crop."""
        return self.bottleneck(x).mean(dim=(2, 3, 4))

    def proxy_outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of the heads in use, whatever the mode."""
        deep = self.bottleneck(x)
        tokens = deep.flatten(2)  # (B, channels, tokens)
        pooled = tokens.mean(dim=2)
        outputs = {}
        if "rotation" in self.tasks:
            outputs["rotation"] = self.rotation_head(tokens[..., 0] if self.pooling == "token" else pooled)
        if "contrast" in self.tasks:
            outputs["contrast"] = self.contrastive_head(tokens[..., 1] if self.pooling == "token" else pooled)
        if "inpainting" in self.tasks:
            outputs["inpainting"] = self.conv(deep)
        return outputs

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor] | torch.Tensor:
        return self.proxy_outputs(x) if self.training else self.conv(self.bottleneck(x))
