# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Load the start weights of a network: an encoder, a whole network, or none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import SwinUNETR

from ..errors import InputError
from ..words import shown
from .dialects import find_weights
from .loading import load_encoder, load_model
from .merging_order import merging_of
from .whole_network import load_whole_network

logger = logging.getLogger(__name__)


def start_checkpoint(pretrained_encoder: str | None, pretrained_model: str | None) -> str | None:
    """Return the file that determines which encoder is built, or None.

    Raises:
        InputError: both are set, or one is a list.
    """
    for name, value in (("pretrained_encoder", pretrained_encoder), ("pretrained_model", pretrained_model)):
        if isinstance(value, (list, tuple)):
            raise InputError(f"--{name} {shown(value)}: a training starts from one file. Name one.")
    if pretrained_encoder and pretrained_model:
        raise InputError(
            f"--pretrained_encoder {pretrained_encoder} and --pretrained_model {pretrained_model} exclude each other: "
            "the model contains an encoder. Set only one of them."
        )
    return pretrained_encoder or pretrained_model or None


def load_start_weights(
    network: torch.nn.Module,
    *,
    pretrained_encoder: str | None,
    pretrained_model: str | None,
    patch_embed: str = "repeat",
    allow_partial: Sequence[str] = (),
    merging: str | None = None,
    freeze_encoder: bool = False,
) -> dict[str, Any] | None:
    """Load the start weights completely, or log that the network is trained from scratch.

    Returns:
        The report of `load_encoder`, `load_whole_network` or `load_model`, plus the patch-merging order and its source,
        to be saved with the trained weights; None for training from scratch.

    Raises:
        InputError: see `load_encoder`, `load_whole_network` and `load_model`; or ``freeze_encoder`` or ``allow_partial``
            is set without weights, or ``allow_partial`` with those of a pre-training network.
    """
    path = start_checkpoint(pretrained_encoder, pretrained_model)
    if path is None:
        if freeze_encoder:
            raise InputError(
                "--freeze_encoder true would freeze random weights. Set --pretrained_encoder or --pretrained_model, or remove --freeze_encoder."
            )
        if allow_partial:
            raise InputError(
                f"--allow_partial {shown(allow_partial)} names what a weights file may lack, and no file is set. Set "
                "--pretrained_encoder or --pretrained_model, or remove --allow_partial."
            )
        logger.info("no --pretrained_encoder and no --pretrained_model: training from scratch")
        return None
    order, source = merging_of(find_weights(path), merging)
    if pretrained_encoder:
        report = load_encoder(network, path, patch_embed=patch_embed, allow_partial=allow_partial)
    elif isinstance(network, SwinUNETR):
        report = load_whole_network(network, path, patch_embed=patch_embed, allow_partial=allow_partial)
    else:  # the network of a pre-training, with its heads
        if allow_partial:
            raise InputError(
                f"--allow_partial {shown(allow_partial)}: {path} is read as a whole pre-training network, which must be "
                "complete. Use --pretrained_encoder for a file that lacks tensors, or remove --allow_partial."
            )
        report = load_model(network, path)
    return {**report, "merging": order, "merging_said_by": source}
