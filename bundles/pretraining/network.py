# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Network for pre-training: a Swin encoder, or a whole Swin UNETR, and one head per proxy task.

Parameter names are those of the official pre-training checkpoints (``swinViT``, ``rotation_head``,
``contrastive_head``, ``conv``), so that these can be continued, and those of MONAI's `SwinUNETR` (``swinViT``,
``encoder1`` ... ``decoder1``), so that encoder and decoder fit it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.blocks import UnetOutBlock
from monai.networks.nets import SwinUNETR
from torch import nn

from ..common.errors import InputError
from ..common.networks.compiled import replays_graphs
from ..common.networks.fast.swin import FastSwinTransformer
from ..common.networks.fast.unet_blocks import FastUnetOutBlock, conv_norm_act
from ..common.networks.positions import UNIT
from ..common.networks.swin_unetr import build_encoder, build_swin_unetr
from ..common.weights.dialects import find_weights
from .proxy_tasks.pooled_norm import PooledNorm
from .proxy_tasks.tasks import PAPER_TASKS, check_tasks, split_views

EMBEDDING = 512  # length of the contrastive embedding, a linear projection (Tang et al., CVPR 2022)


def _vae_head(channels: int, out_channels: int) -> nn.Sequential:
    """Return five blocks of convolution, instance norm, leaky ReLU and trilinear 2x upsampling; a 1x1x1 convolution.

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
    """Return five transposed convolutions, each of which doubles the resolution."""
    widths = [channels, channels // 2, channels // 4, channels // 8, channels // 16, out_channels]
    return nn.Sequential(
        *(nn.ConvTranspose3d(a, b, kernel_size=2, stride=2) for a, b in zip(widths[:-1], widths[1:], strict=True))
    )


def _large_kernel_deconv_head(channels: int, out_channels: int) -> nn.Module:
    """Return one transposed convolution with kernel size and stride 32, as described in the paper."""
    return nn.ConvTranspose3d(channels, out_channels, kernel_size=32, stride=32)


def _start_grey(head: nn.Module) -> None:
    """Let a reconstruction start at 0.5 everywhere, give or take a tenth of its usual spread.

    Otherwise it starts at a random grey, and a small learning rate takes hundreds of steps to leave it: after 200 steps
    at 5e-4, one seed of five was at 0.1 where the crops are at 0.4.
    """
    *_, last = (module for module in head.modules() if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)))
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.fill_(0.5)


def _last_layer(feature_size: int, out_channels: int, *, fast: bool) -> nn.Module:
    """Return the last layer of Swin UNETR, a 1x1x1 convolution, for another number of channels."""
    block = FastUnetOutBlock if fast else UnetOutBlock
    return block(spatial_dims=3, in_channels=feature_size, out_channels=out_channels)


UNET = "unet"  # reconstruction through Swin UNETR's own decoder and skip connections
HEADS_AT_THE_BOTTLENECK = {
    "vae": _vae_head,
    "deconv": _deconv_head,
    "large_kernel_deconv": _large_kernel_deconv_head,
}
RECONSTRUCTION_HEADS = (*HEADS_AT_THE_BOTTLENECK, UNET)
# All parts of Swin UNETR except the encoder and the last layer.
DECODER_PARTS = tuple(f"encoder{i}" for i in (1, 2, 3, 4, 10)) + tuple(f"decoder{i}" for i in (5, 4, 3, 2, 1))
NORMALISED = "normalised_mean"
POOLINGS = ("token", "mean", NORMALISED)
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
        InputError: the checkpoint was trained with heads other than those requested.
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

    ``last.pt`` records them among the settings of its run. For an official checkpoint with heads they follow from the
    names of its tensors: all tasks, pooling ``token``, and one of three reconstruction heads.

    Args:
        checkpoint: the file.
        optional: a file that does not exist (yet) records nothing, as needed for ``verify_net_in_out``.

    Raises:
        InputError: the file is something else, such as an ``encoder.pt``, which has no heads.
    """
    if optional and not Path(checkpoint).exists():
        return {"heads": dict(OFFICIAL_HEADS), "tasks": list(PAPER_TASKS), "trained": {}}
    found = find_weights(checkpoint)
    if {"heads", "tasks"} <= set(found.content):
        return {"trained": {}, **found.content}
    settings = found.content.get("settings")
    if isinstance(settings, Mapping) and {"heads", "tasks"} <= set(settings):  # last.pt
        tasks = list(check_tasks(settings["tasks"]))
        return {"heads": dict(settings["heads"]), "tasks": tasks, "trained": dict(settings)}
    # an official checkpoint
    heads = {"conv.20.weight": "vae", "conv.4.weight": "deconv", "conv.weight": "large_kernel_deconv"}
    reconstruction = next((head for name, head in heads.items() if name in found.rest), None)
    if reconstruction is None or not {"rotation_head.weight", "contrastive_head.weight"} <= set(found.rest):
        raise InputError(
            f"{checkpoint} is not a complete pre-training network (encoder and heads). Use the model.pt next to its "
            "encoder.pt; to start from an encoder only, use --pretrained_encoder."
        )
    return {
        "heads": {**OFFICIAL_HEADS, "reconstruction_head": reconstruction},
        "tasks": list(PAPER_TASKS),
        "trained": {"seed": 0},
    }


# Values for files that do not record them: the defaults of train.yaml.
ASSUMED_IF_NOT_RECORDED = {
    "foreground_hu": -500.0,
    "hu_window": [-1000.0, 1000.0],
    "crops_per_volume": 2,
    "min_body": 0.01,
    "temperature": 0.5,
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
    """Swin encoder or whole Swin UNETR, with heads for the proxy tasks.

    The decoder of Swin UNETR is part of the network if the reconstruction head is ``unet`` or position is a task.

    In training mode, a forward pass of V views (in the order of `proxy_tasks.tasks`) returns a dict of the heads in
    use: ``rotation`` (B, 4), ``contrast`` (B, 512), ``inpainting`` (B, C, X, Y, Z) of the masked views, and
    ``position`` (B', 3, X, Y, Z), in units of 100 mm, of the views for position. In eval mode it returns one tensor for
    any views, which the verifier of the model zoo requires: the reconstruction, or the position in mm if inpainting is
    not a task.

    Args:
        encoder: encoder record (`common.weights.encoder_record`).
        tasks: proxy tasks whose heads are used; heads of the paper's other tasks exist, but are frozen.
        scored: some of the tasks: the network has all tasks, but gets and returns only the views of these. None: all.
        heads: ``reconstruction_head`` (one of `RECONSTRUCTION_HEADS`) and ``pooling``, the input of rotation and
            contrast: ``token``, bottleneck voxels 0 and 1 (official code); ``mean`` over the bottleneck; or
            ``normalised_mean``, the same normalised over the views of a step (`PooledNorm`).
        use_checkpoint: use gradient checkpointing in the encoder.
        fast: same results with less time and memory; False: unmodified MONAI and the official order of layers.
        guard: is called with the network, to watch the weights that it is given (`MergingGuard`).

    Raises:
        InputError: a head, pooling or task is unknown, the decoder does not fit the encoder, or ``scored`` has other
            tasks.
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        tasks: Sequence[str],
        scored: Sequence[str] | None = None,
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
        self.unet = heads["reconstruction_head"] == UNET
        self.whole = self.unet or "position" in self.tasks
        channels, feature_size = 16 * encoder["feature_size"], encoder["feature_size"]
        if self.whole:
            self._add_whole_network(encoder, use_checkpoint=use_checkpoint, fast=fast)
        else:
            self.swinViT = build_encoder(encoder, use_checkpoint=use_checkpoint, fast=fast)
        if self.pooling == NORMALISED:
            self.pooled_norm = PooledNorm()
        self.rotation_head = nn.Linear(channels, 4)
        self.contrastive_head = nn.Linear(channels, EMBEDDING)
        task_heads = {"rotation": self.rotation_head, "contrast": self.contrastive_head}
        if self.unet:
            self.conv = _last_layer(feature_size, encoder["in_channels"], fast=fast)
        else:
            self.conv = HEADS_AT_THE_BOTTLENECK[heads["reconstruction_head"]](channels, encoder["in_channels"])
            if fast and heads["reconstruction_head"] == "vae":
                self.conv = _EarlyProjection(*self.conv)
        _start_grey(self.conv)
        task_heads["inpainting"] = self.conv
        if "position" in self.tasks:
            self.position_head = _last_layer(feature_size, 3, fast=fast)
            task_heads["position"] = self.position_head
        for task, head in task_heads.items():
            head.requires_grad_(task in self.tasks)
        uses_decoder = "position" in self.tasks or (self.unet and "inpainting" in self.tasks)
        for name in DECODER_PARTS if self.whole else ():
            getattr(self, name).requires_grad_(uses_decoder)
        if scored is not None:
            scored = check_tasks(scored)
            if others := [task for task in scored if task not in self.tasks]:
                raise InputError(
                    f"--tasks {list(scored)}: this model did not learn {', '.join(others)}. It learnt {', '.join(self.tasks)}."
                )
            self.tasks = scored
        if guard is not None:
            guard(self)

    @property
    def decoder_regions(self) -> list[nn.Module]:
        """Heads that rebuild images, besides the decoder of Swin UNETR: `common.networks.compiled` compiles them."""
        return [self.conv]

    def _add_whole_network(self, encoder: Mapping[str, Any], *, use_checkpoint: bool, fast: bool) -> None:
        """Take all parts of a Swin UNETR except its last layer."""
        if len(encoder["depths"]) != 4:
            raise InputError(
                f"depths {list(encoder['depths'])}: the decoder of Swin UNETR needs an encoder of four stages. Use another "
                "--reconstruction_head than unet, no task position, or four --depths."
            )
        network: SwinUNETR = build_swin_unetr(encoder, out_channels=1, use_checkpoint=use_checkpoint, fast=fast)
        self.swinViT = network.swinViT
        for name in DECODER_PARTS:
            setattr(self, name, getattr(network, name))

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """Return the encoder output at 1/32 of the resolution: (B, 16 x feature_size, X/32, Y/32, Z/32)."""
        if isinstance(self.swinViT, FastSwinTransformer):
            return self.swinViT.deepest(x)
        return self.swinViT(x.contiguous())[4]

    def embedding(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of the bottleneck over space, (B, 16 x feature_size): one vector per crop."""
        return self.bottleneck(x).mean(dim=(2, 3, 4))

    def decode(self, x: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the features before the last layer of Swin UNETR, (B, feature_size, X, Y, Z).

        Args:
            x: (B, C, X, Y, Z).
            hidden: the five outputs of the encoder for ``x``.
        """
        up = self.decoder5(self.encoder10(hidden[4]), hidden[3])
        up = self.decoder4(up, self.encoder4(hidden[2]))
        up = self.decoder3(up, self.encoder3(hidden[1]))
        up = self.decoder2(up, self.encoder2(hidden[0]))
        return self.decoder1(up, self.encoder1(x))

    @replays_graphs
    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return what a probe reads: the encoder's five hidden states and, in a whole network, the decoder's output.

        Args:
            x: (B, C, X, Y, Z).

        Returns:
            Tensors (B, 2^i x feature_size, X / 2^(i+1), ...) for i = 0 to 4, each voxel normalised over its channels,
            as the decoder of Swin UNETR gets them; then (B, feature_size, X, Y, Z).
        """
        x = x.contiguous()
        hidden = list(self.swinViT(x))
        return [*hidden, self.decode(x, hidden)] if self.whole else hidden

    @replays_graphs
    def predict_positions(self, x: torch.Tensor) -> torch.Tensor:
        """Return the position of every voxel in mm, up to a shift of the scan: (B, 3, X, Y, Z)."""
        x = x.contiguous()
        return UNIT * self._positions(self.decode(x, self.swinViT(x)))

    def _positions(self, features: torch.Tensor) -> torch.Tensor:
        """Return positions in units of 100 mm, in float32: bfloat16 would round 500 mm to 2 mm."""
        with torch.autocast(features.device.type, enabled=False):
            return self.position_head(features.float())

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of masked crops, of their shape."""
        x = x.contiguous()
        return self.conv(self.decode(x, self.swinViT(x)) if self.unet else self.bottleneck(x))

    @replays_graphs
    def proxy_outputs(self, x: torch.Tensor, *, embedding: bool = False) -> dict[str, torch.Tensor]:
        """Return the outputs of the heads in use, in any mode.

        Args:
            x: views in the order of `proxy_tasks.tasks`.
            embedding: also return ``embedding`` of all views, as in `embedding`.
        """
        x = x.contiguous()
        hidden = self.swinViT(x) if self.whole else [self.bottleneck(x)]
        deep, _ = split_views(hidden[-1], self.tasks)
        outputs = {}
        if embedding:
            outputs["embedding"] = hidden[-1].mean(dim=(2, 3, 4))
        if len(deep):
            tokens = deep.flatten(2)  # (B, channels, tokens)
            pooled = tokens.mean(dim=2)
            if self.pooling == NORMALISED:
                pooled = self.pooled_norm(pooled)
        if "rotation" in self.tasks:
            outputs["rotation"] = self.rotation_head(tokens[..., 0] if self.pooling == "token" else pooled)
        if "contrast" in self.tasks:
            outputs["contrast"] = self.contrastive_head(tokens[..., 1] if self.pooling == "token" else pooled)
        reads_decoder = [task for task in ("inpainting", "position") if task in self.tasks]
        if not self.unet and "inpainting" in reads_decoder:
            outputs["inpainting"] = self.conv(deep)
            reads_decoder.remove("inpainting")
        if reads_decoder:
            parts = [split_views(volumes, self.tasks) for volumes in (x, *hidden)]
            if len(reads_decoder) == 1:  # only these views go through the decoder
                which = reads_decoder == ["position"]
                features = self.decode(parts[0][which], [part[which] for part in parts[1:]])
                features = (features, features)
            else:
                features = split_views(self.decode(x, hidden), self.tasks)
            if "inpainting" in reads_decoder:
                outputs["inpainting"] = self.conv(features[0])
            if "position" in reads_decoder:
                outputs["position"] = self._positions(features[1])
        return outputs

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor] | torch.Tensor:
        if self.training:
            return self.proxy_outputs(x)
        if "position" in self.tasks and "inpainting" not in self.tasks:
            return self.predict_positions(x)
        return self.reconstruct(x)
