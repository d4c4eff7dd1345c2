# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps are the user's unit; MONAI's trainer counts epochs. An epoch here is the stretch between two validations."""

from __future__ import annotations

from .input_error import InputError


def epoch_plan(*, max_steps: int, val_interval: int) -> dict[str, int]:
    """Cut ``max_steps`` into equal epochs of about ``val_interval`` steps.

    Returns:
        ``epochs``, ``epoch_length`` and their product ``steps``, which is ``max_steps`` rounded up to a whole number of epochs
        (250 steps with an interval of 100 are 3 x 84 = 252).

    Raises:
        InputError: if either number is below 1.
    """
    for name, value in (("max_steps", max_steps), ("val_interval", val_interval)):
        if int(value) < 1:
            raise InputError(f"--{name} {value} must be at least 1.")
    epochs = -(-max_steps // min(val_interval, max_steps))
    length = -(-max_steps // epochs)
    return {"epochs": epochs, "epoch_length": length, "steps": epochs * length}
