# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a segmentation network starts from: an encoder, a whole network, or nothing."""

from __future__ import annotations

import logging

import torch

from .input_error import InputError
from .weights import load_encoder, load_model

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
    network: torch.nn.Module, *, pretrained_encoder: str | None, pretrained_model: str | None
) -> None:
    """Load what was given, completely, or say that the network starts from scratch.

    Raises:
        InputError: see `weights.load_encoder` and `weights.load_model`.
    """
    if pretrained_encoder:
        load_encoder(network, pretrained_encoder)
    elif pretrained_model:
        load_model(network, pretrained_model)
    else:
        logger.info("no --pretrained_encoder and no --pretrained_model: the network starts from scratch")
