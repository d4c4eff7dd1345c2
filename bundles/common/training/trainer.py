# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""MONAI's `SupervisedTrainer`, on versions too whose own one does not accumulate gradients."""

from __future__ import annotations

import inspect
from typing import Any

import monai
from monai.engines import SupervisedTrainer

from ..errors import InputError


def supervised_trainer(*, accumulation_steps: int = 1, **arguments: Any) -> SupervisedTrainer:
    """MONAI's trainer; MONAI Label may run with an older MONAI than 1.6, whose trainer has no ``accumulation_steps``.

    Args:
        accumulation_steps: iterations to a step.
        arguments: all others of `SupervisedTrainer`.

    Raises:
        InputError: several iterations to a step are asked for, and this MONAI cannot.
    """
    if "accumulation_steps" in inspect.signature(SupervisedTrainer).parameters:
        return SupervisedTrainer(accumulation_steps=accumulation_steps, **arguments)
    if accumulation_steps != 1:
        raise InputError(
            f"--accumulation_steps {accumulation_steps} (or --global_batch_size): MONAI {monai.__version__} cannot add up gradients. "
            "Leave it out, or install MONAI 1.6.1 or newer."
        )
    trainer = SupervisedTrainer(**arguments)
    trainer.accumulation_steps = 1  # what the handlers ask for
    return trainer
