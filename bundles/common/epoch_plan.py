# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps are the user's unit; MONAI's trainer counts epochs. An epoch here is the stretch between two validations."""

from __future__ import annotations

import logging

from .input_error import InputError

logger = logging.getLogger(__name__)


def epoch_plan(*, max_steps: int, val_interval: int, warmup_steps: int = 0) -> dict[str, int]:
    """Cut ``max_steps`` into equal epochs of about ``val_interval`` steps.

    A warm-up that is as long as the run is logged as a warning: the learning rate would never reach its value.

    Returns:
        ``epochs``, ``epoch_length`` and their product ``steps``, which is ``max_steps`` rounded up to a whole number of epochs
        (250 steps with an interval of 100 are 3 x 84 = 252).

    Raises:
        InputError: if either number is not a whole number from 1.
    """
    for name, value in (("max_steps", max_steps), ("val_interval", val_interval)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"--{name} {value!r} must be a whole number of at least 1.")
    if warmup_steps >= max_steps:
        logger.warning(
            "the warm-up of %d steps is as long as the run of %d: the learning rate never reaches its value. Give --warmup_steps, about a tenth of the run",
            *(warmup_steps, max_steps),
        )
    epochs = -(-max_steps // min(val_interval, max_steps))
    length = -(-max_steps // epochs)
    return {"epochs": epochs, "epoch_length": length, "steps": epochs * length}
