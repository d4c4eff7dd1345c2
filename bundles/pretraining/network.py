# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Network for pre-training: a Swin encoder and one head per proxy task.

Parameter names are those of the official pre-training checkpoints (``swinViT``, ``rotation_head``,
``contrastive_head``, ``conv``), so that these can be continued and the encoder fits MONAI's `SwinUNETR`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

EMBEDDING = 512  # length of the contrastive embedding, a linear projection (Tang et al., CVPR 2022)


def _vae_head(channels: int, out_channels: int) -> nn.Sequential:
    """Five blocks of convolution, instance norm, leaky ReLU and trilinear 2x upsampling; a 1x1x1 convolution.

    Default of the official code.
    """
    layers: list[nn.Module] = []
    widths = [channels, channels // 2, channels // 4, channels // 8, channels // 16, channels // 16]
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [  # groups of four, as _EarlyProjection expects
            nn.Conv3d(width_in, width_out, kernel_size=3, padding=1),
            nn.InstanceNorm3d(width_out),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
        ]
    return nn.Sequential(*layers, nn.Conv3d(widths[-1], out_channels, kernel_size=1))


class _EarlyProjection(nn.Sequential):
    """`_vae_head` with its last convolution before the last upsampling, on an eighth of the voxels.

    The results are equal: both are linear, one acts only on channels and the other only on space, and interpolation
    weights add up to 1, so that the bias is the same before and after.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *layers, project = self
        for conv, norm, act, double in zip(*[iter(layers)] * 4, strict=True):
            x = conv_norm_act(conv, norm, act, x)
            x = double(project(x) if double is layers[-1] else x)
        return x


def _deconv_head(channels: int, out_channels: int) -> nn.Sequential:
    """Five transposed convolutions, each of which doubles the resolution."""
    widths = [channels, channels // 2, channels // 4, channels // 8, channels // 16, out_channels]
    return nn.Sequential(
        *(nn.ConvTranspose3d(a, b, kernel_size=2, stride=2) for a, b in zip(widths[:-1], widths[1:], strict=True))
    )


def _large_kernel_deconv_head(channels: int, out_channels: int) -> nn.Module:
    """One transposed convolution with kernel size and stride 32, as described in the paper."""
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
    """Choose the heads: the user's options, else those that the checkpoint was trained with, else those of the preset.

    ``pooling`` is not visible in the weights, so a checkpoint used with another pooling would be silently wrong.

    Args:
        asked: ``reconstruction_head`` and ``pooling``, None if not set.
        checkpoint: ``model.pt`` of this bundle, or None.
        preset: values of the preset.
        optional: ignore a checkpoint file that does not exist (yet), as needed for ``verify_net_in_out``.

    Raises:
        InputError: the checkpoint was trained with other heads than those requested.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    has_file = checkpoint is not None and (Path(checkpoint).exists() or not optional)
    saved = dict(read_model(str(checkpoint))["heads"]) if has_file else {}
    for name, value in asked.items():
        if saved.get(name, value) != value:
            raise InputError(f"{checkpoint} was trained with {name} {saved[name]}, not {value}. Do not set --{name}.")
    return {name: str({**preset, **saved, **asked}[name]) for name in OFFICIAL_HEADS}


def read_model(checkpoint: str, *, optional: bool = False) -> dict[str, Any]:
    """Read ``heads``, ``tasks`` and ``trained`` from the file of a complete pre-training network, for an evaluation.

    For an official checkpoint with heads they follow from the names of its tensors: all tasks, pooling ``token``, and
    one of three reconstruction heads.

    Args:
        checkpoint: the file.
        optional: a file that does not exist (yet) records nothing, as needed for ``verify_net_in_out``.

    Raises:
        InputError: the file is something else, such as an ``encoder.pt``, which has no heads.
    """
    if optional and not Path(checkpoint).exists():
        return {"heads": dict(OFFICIAL_HEADS), "tasks": list(TASKS), "trained": {}}
    found = find_weights(checkpoint)
    if {"heads", "tasks"} <= set(found.content):
        return {"trained": {}, **found.content}
    heads = {"conv.20.weight": "vae", "conv.4.weight": "deconv", "conv.weight": "large_kernel_deconv"}
    reconstruction = next((head for name, head in heads.items() if name in found.rest), None)
    if reconstruction is None or not {"rotation_head.weight", "contrastive_head.weight"} <= set(found.rest):
        raise InputError(
            f"{checkpoint} is not a complete pre-training network (encoder and heads). Use the model.pt next to its "
            "encoder.pt; to start from an encoder only, use --pretrained_encoder."
        )
    return {
        "heads": {**OFFICIAL_HEADS, "reconstruction_head": reconstruction},
        "tasks": list(TASKS),
        "trained": {"seed": 0},
    }


# Values for files that do not record them: the defaults of train.yaml.
ASSUMED_IF_NOT_RECORDED = {
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
    """Return settings for an evaluation: those recorded by the training, else those of the preset, else of train.yaml.

    Args:
        trained: result of `read_model`.
        preset: values of the preset.
    """
    return {**ASSUMED_IF_NOT_RECORDED, **preset, **trained["trained"]}


class SwinPretrainer(nn.Module):
    """Swin encoder with heads for rotation, contrast and reconstruction.

    In training mode, a forward pass returns a dict of the heads in use: ``rotation`` (B, 4), ``contrast`` (B, 512) and
    ``inpainting`` (B, C, X, Y, Z). In eval mode it returns only the reconstruction, as one tensor, which the verifier
    of the model zoo requires.

    Args:
        encoder: encoder record (`common.weights.encoder_record`).
        tasks: proxy tasks whose heads are used; heads of other tasks exist, but are frozen.
        heads: ``reconstruction_head`` (``vae``, ``deconv`` or ``large_kernel_deconv``) and ``pooling``, the input of
            rotation and contrast: ``token``, bottleneck voxels 0 and 1 (official code), or ``mean`` over the
                bottleneck.
        use_checkpoint: use gradient checkpointing in the encoder.
        fast: same results with less time and memory; False: unmodified MONAI and the official order of layers.
        guard: is called with the network, to watch the weights that it is given (`MergingGuard`).

    Raises:
        InputError: a head, pooling or task is unknown.
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        tasks: Sequence[str],
        heads: Mapping[str, str] = OFFICIAL_HEADS,
        use_checkpoint: bool = False,
        fast: bool = True,
        guard: Callable[[nn.Module], None] | None = None,
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
        if guard is not None:
            guard(self)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """Return the encoder output at 1/32 of the resolution: (B, 16 x feature_size, X/32, Y/32, Z/32)."""
        if isinstance(self.swinViT, FastSwinTransformer):
            return self.swinViT.deepest(x)
        return self.swinViT(x.contiguous())[4]

    def embedding(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of the bottleneck over space, (B, 16 x feature_size): one vector per crop."""
        return self.bottleneck(x).mean(dim=(2, 3, 4))

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return what a probe reads: the five hidden states of the encoder.

        Args:
            x: (B, C, X, Y, Z).

        Returns:
            Tensors (B, 2^i x feature_size, X / 2^(i+1), ...) for i = 0 to 4, each voxel normalised over its channels, as
            the decoder of Swin UNETR gets them.
        """
        return list(self.swinViT(x.contiguous()))

    def proxy_outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs of the heads in use, in any mode."""
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
