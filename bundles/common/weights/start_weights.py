# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a segmentation network starts from: an encoder, a whole network, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError
from .dialects import find_weights
from .loading import load_encoder, load_model
from .merging_order import merging_of

logger = logging.getLogger(__name__)


def start_checkpoint(pretrained_encoder: str | None, pretrained_model: str | None) -> str | None:
    """The file that decides which encoder is built, if there is one.

    Raises:
        InputError: if both are given.
    """
    if pretrained_encoder and pretrained_model:
        raise InputError(
            f"--pretrained_encoder {pretrained_encoder} and --pretrained_model {pretrained_model} exclude each other: "
            "the model has an encoder of its own. Give one of them."
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
    """Load what was given, completely, or say that the network starts from scratch.

    Returns:
        The report of `weights.load_encoder` or `load_model` and the order of patch merging with who says so, to be kept with what is trained;
        None for a start from scratch.

    Raises:
        InputError: see `weights.load_encoder` and `weights.load_model`; or random weights were to be frozen (``freeze_encoder``).
    """
    path = start_checkpoint(pretrained_encoder, pretrained_model)
    if path is None:
        if freeze_encoder:
            raise InputError(
                "--freeze_encoder true would freeze random weights: give --pretrained_encoder or --pretrained_model, or leave it out."
            )
        logger.info("no --pretrained_encoder and no --pretrained_model: the network starts from scratch")
        return None
    order, says = merging_of(find_weights(path), merging)
    if pretrained_encoder:
        report = load_encoder(network, path, patch_embed=patch_embed, allow_partial=allow_partial)
    else:
        report = load_model(network, path)
    return {**report, "merging": order, "merging_said_by": says}
