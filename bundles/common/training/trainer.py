# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Build MONAI's `SupervisedTrainer`, also with MONAI versions that do not support gradient accumulation."""

from __future__ import annotations

import inspect
from typing import Any

import monai
from monai.engines import SupervisedTrainer

from ..errors import InputError


def supervised_trainer(*, accumulation_steps: int = 1, **arguments: Any) -> SupervisedTrainer:
    """Build MONAI's trainer.

    MONAI Label may run with a MONAI older than 1.6, whose trainer has no ``accumulation_steps``.

    Args:
        accumulation_steps: iterations per step.
        arguments: all other arguments of `SupervisedTrainer`.

    Raises:
        InputError: ``accumulation_steps`` is above 1 and this MONAI does not support it.
    """
    if "accumulation_steps" in inspect.signature(SupervisedTrainer).parameters:
        return SupervisedTrainer(accumulation_steps=accumulation_steps, **arguments)
    if accumulation_steps != 1:
        raise InputError(
            f"--accumulation_steps {accumulation_steps} (or --global_batch_size): MONAI {monai.__version__} cannot accumulate gradients. "
            "Remove the option, or install MONAI 1.6.1 or newer."
        )
    trainer = SupervisedTrainer(**arguments)
    trainer.accumulation_steps = 1  # read by the handlers
    return trainer
