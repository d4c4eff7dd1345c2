# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Learning rates by depth: the first stages of a pre-trained encoder move less than the decoder, which starts anew."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from ...common.errors import InputError
from ...common.weights.dialects import ENCODER

logger = logging.getLogger(__name__)

STAGES = 5  # the patch embedding, then four stages


def _stage(name: str) -> int:
    """0 for the patch embedding, 1 to 4 for the stages of the encoder, 5 for everything else."""
    name = name.removeprefix("module.")
    if not name.startswith(ENCODER):
        return STAGES
    stage = re.match(re.escape(ENCODER) + r"layers([1-4])", name)
    return int(stage.group(1)) if stage else 0


def parameter_groups(
    network: torch.nn.Module, *, learning_rate: float, encoder_lr_decay: float, pretrained: bool
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, one per stage, the decoder's last.

    Layer-wise decay as in the fine-tuning of BEiT and MAE (Bao et al., arXiv 2106.08254; He et al., arXiv 2111.06377), by stages instead of blocks:
    a stage k steps before the decoder learns with ``learning_rate * encoder_lr_decay ** k``.

    Args:
        network: a `SwinUNETR`, bare or in ``DistributedDataParallel``.
        learning_rate: of the decoder.
        encoder_lr_decay: in (0, 1]; 1 gives every stage the same.
        pretrained: whether the encoder comes from a file. One that starts from scratch learns at full rate, so that a control with the same
            options is not held back.

    Parameters that need no gradient (`swin_encoder.build_swin_unetr` can freeze the encoder) are in no group.

    Raises:
        InputError: ``encoder_lr_decay`` lies outside (0, 1].
    """
    if isinstance(encoder_lr_decay, bool) or not 0 < encoder_lr_decay <= 1:
        raise InputError(f"--encoder_lr_decay {encoder_lr_decay!r} must lie above 0 and be at most 1 (1: no decay).")
    if encoder_lr_decay < 1 and not pretrained:
        logger.info(
            "the encoder starts from scratch: it learns at full rate (encoder_lr_decay is for a pre-trained one)"
        )
        encoder_lr_decay = 1.0
    stages: list[list[torch.nn.Parameter]] = [[] for _ in range(STAGES + 1)]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            stages[_stage(name)].append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * encoder_lr_decay ** (STAGES - stage)}
        for stage, parameters in enumerate(stages)
        if parameters
    ]
