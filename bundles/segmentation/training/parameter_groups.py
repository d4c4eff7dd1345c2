# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Layer-wise learning rates: early stages of a pre-trained encoder learn slower than the newly initialised decoder."""

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
    """Stage of a parameter: 0 for the patch embedding, 1 to 4 for the encoder's stages, 5 for everything else."""
    name = name.removeprefix("module.")
    if not name.startswith(ENCODER):
        return STAGES
    stage = re.match(re.escape(ENCODER) + r"layers([1-4])", name)
    return int(stage.group(1)) if stage else 0


def parameter_groups(
    network: torch.nn.Module, *, learning_rate: float, encoder_lr_decay: float, pretrained: bool
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser, one per stage, the decoder's last.

    Layer-wise learning rate decay as in the fine-tuning of BEiT and MAE (Bao et al., arXiv 2106.08254; He et al., arXiv
    2111.06377), by stage instead of by block: the stage k steps before the decoder gets the learning rate
    ``learning_rate * encoder_lr_decay ** k``. Frozen parameters (see `build_swin_unetr`) are in no group.

    Args:
        network: a `SwinUNETR`, bare or wrapped in ``DistributedDataParallel``.
        learning_rate: of the decoder.
        encoder_lr_decay: in (0, 1]; 1 gives every stage the same rate.
        pretrained: whether the encoder comes from a file. An encoder trained from scratch learns at the full rate, so
            that a control run with the same options is not slowed down.

    Raises:
        InputError: ``encoder_lr_decay`` is outside (0, 1].
    """
    if isinstance(encoder_lr_decay, bool) or not 0 < encoder_lr_decay <= 1:
        raise InputError(f"--encoder_lr_decay {encoder_lr_decay!r} must be above 0 and at most 1 (1: no decay).")
    if encoder_lr_decay < 1 and not pretrained:
        logger.info(
            "the encoder starts from scratch and learns at the full rate: --encoder_lr_decay applies to pre-trained ones"
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
