# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Learning rates by part of the network: the Swin transformer, its stages, and the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..run.options import check_option
from ..value_rules import SHARE_ABOVE_ZERO
from ..weights.dialects import ENCODER
from ..weights.module_table import part_of

logger = logging.getLogger(__name__)

STAGES = 5  # the patch embedding, then four stages


def _stage(name: str) -> int:
    """Return the stage of a parameter: 0 is the patch embedding, 1 to 4 are the encoder's stages, 5 is the rest."""
    part = part_of(name)
    if not part.startswith(ENCODER):
        return STAGES
    stage = part.removeprefix(f"{ENCODER}layers")
    return int(stage) if stage in ("1", "2", "3", "4") else 0


def starts_anew(name: str, start: Mapping[str, Any] | None) -> bool:
    """Return whether a parameter has its random initial values, not those of a file.

    Args:
        name: the parameter's name, as in the report.
        start: report of the start weights (`load_start_weights`); None: training from scratch.
    """
    if start is None:
        return True
    # the report of an encoder lists only tensors of the encoder as missing, its table covers the whole network
    return name in start["missing"] or start["modules"][name.split(".")[0]]["from_file"] == 0


def parameter_groups(
    network: torch.nn.Module,
    *,
    learning_rate: float,
    encoder_lr_factor: float = 1.0,
    encoder_lr_decay: float = 1.0,
    start: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser, by stage and by whether the parameters start from scratch.

    The Swin transformer learns at ``learning_rate * encoder_lr_factor``, the rest (convolutions, heads) at
    ``learning_rate``. ``encoder_lr_decay`` is layer-wise learning rate decay as in the fine-tuning of BEiT and MAE (Bao
    et al., arXiv 2106.08254; He et al., arXiv 2111.06377), by stage instead of by block: the stage k steps before the
    decoder gets a further factor ``encoder_lr_decay ** k``. Frozen parameters (see `build_swin_unetr`) are in no group.

    Args:
        network: a network with the names of `SwinUNETR`, bare or wrapped in ``DistributedDataParallel``.
        learning_rate: rate of everything outside the Swin transformer.
        encoder_lr_factor: above 0; from scratch, too.
        encoder_lr_decay: in (0, 1]; 1 gives every stage the same rate. It applies only to pre-trained weights: an
            encoder trained from scratch is not slowed down, so that a control run with the same options is fair.
        start: report of the start weights (`load_start_weights`); None: training from scratch.

    Returns:
        Groups ``{"params", "lr", "starts_anew"}``, in the order of the stages, parameters that start from scratch last.
        They do not depend on the rates, so that a resumed run may change these. The last group is the one whose rate
        the training log shows.

    Raises:
        InputError: ``encoder_lr_factor`` is not above 0, or ``encoder_lr_decay`` is outside (0, 1].
    """
    check_option("encoder_lr_factor", encoder_lr_factor)
    SHARE_ABOVE_ZERO.check("encoder_lr_decay", encoder_lr_decay)
    if encoder_lr_decay < 1 and start is None:
        logger.info("the encoder starts from scratch: --encoder_lr_decay applies to pre-trained ones, and is ignored")
        encoder_lr_decay = 1.0
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("module.")
            groups.setdefault((_stage(name), starts_anew(name, start)), []).append(parameter)
    return [
        {
            "params": groups[stage, anew],
            "lr": learning_rate
            * (1.0 if stage == STAGES else encoder_lr_factor * encoder_lr_decay ** (STAGES - stage)),
            "starts_anew": anew,
        }
        for stage, anew in sorted(groups)
    ]
