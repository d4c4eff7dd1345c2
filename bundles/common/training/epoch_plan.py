# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps are the user's unit; MONAI's trainer counts epochs. An epoch here is the stretch between two validations."""

from __future__ import annotations

import logging

from ..errors import InputError
from ..run.distributed import world_size

logger = logging.getLogger(__name__)


def _check_whole(**numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"--{name} {value!r} must be a whole number of at least 1.")


def accumulation(*, batch_size: int, accumulation_steps: int, global_batch_size: int | None) -> int:
    """Iterations per step, so that ``batch_size x processes x iterations`` is the global batch size.

    Args:
        batch_size: volumes per iteration and process.
        accumulation_steps: iterations per step where no global batch size is asked for.
        global_batch_size: volumes per step over all processes, or None.

    Raises:
        InputError: if the processes cannot make up the global batch size.
    """
    _check_whole(batch_size=batch_size, accumulation_steps=accumulation_steps)
    if global_batch_size is None:
        return accumulation_steps
    _check_whole(global_batch_size=global_batch_size)
    at_once = batch_size * world_size()
    if accumulation_steps != 1 or global_batch_size % at_once:
        reason = (
            f"--accumulation_steps {accumulation_steps} is given too: leave it out"
            if accumulation_steps != 1
            else f"{world_size()} processes x --batch_size {batch_size} make {at_once} at once, which does not divide it: "
            f"choose {max(1, global_batch_size // at_once) * at_once} or {(global_batch_size // at_once + 1) * at_once}, or another number of processes"
        )
        raise InputError(f"--global_batch_size {global_batch_size}: {reason}.")
    return global_batch_size // at_once


def epochs_of(*, max_steps: int, val_interval: int) -> int:
    """Number of equal epochs, of at most ``val_interval`` steps each, that ``max_steps`` take.

    Raises:
        InputError: if a number is not a whole number from 1.
    """
    _check_whole(max_steps=max_steps, val_interval=val_interval)
    return -(-max_steps // min(val_interval, max_steps))


def epoch_plan(
    *,
    max_steps: int,
    val_interval: int,
    warmup_steps: int = 0,
    accumulation_steps: int = 1,
    epochs: int | None = None,
    scans: int | None = None,
    batch_size: int = 1,
) -> dict[str, int]:
    """Cut ``max_steps`` into equal epochs of about ``val_interval`` steps, or plan passes over the scans, as MONAI Label counts.

    A warm-up that is as long as the run is logged as a warning: the learning rate would never reach its value.

    Args:
        max_steps, val_interval: see above; a pass over the scans does not ask them.
        warmup_steps: of the learning rate; with ``scans``, no more than a tenth of the run is taken.
        accumulation_steps: iterations per step.
        epochs: how many; None: as many as ``max_steps`` take.
        scans: number of scans, one pass over which is an epoch; None: see above.
        batch_size: volumes per iteration and process, for ``scans``.

    Returns:
        ``steps``, which is ``max_steps`` rounded up to a whole number of epochs (250 steps with an interval of 100 are 3 x 84 = 252);
        ``epochs``; ``warmup_steps``; and in the engine's iterations, ``accumulation_steps`` to a step, ``epoch_length`` and ``iterations``.

    Raises:
        InputError: if a number is not a whole number from 1.
    """
    usual = epochs_of(max_steps=max_steps, val_interval=val_interval)
    epochs = usual if epochs is None else epochs
    _check_whole(max_epochs=epochs)
    if scans is None:
        length = -(-max_steps // usual)
        if usual * length != max_steps:
            said = "%d steps become %d: %d stretches of %d between validations"
            logger.info(said, max_steps, usual * length, usual, length)
    else:
        length = max(1, -(-scans // (batch_size * world_size() * accumulation_steps)))
        warmup_steps = min(warmup_steps, epochs * length // 10)
        logger.info("%d epochs of %d steps, each a pass over %d scans", epochs, length, scans)
    if warmup_steps >= min(max_steps, epochs * length):
        logger.warning(
            "the warm-up of %d steps is as long as the run of %d: the learning rate never reaches its value. Give --warmup_steps, about a tenth of the run",
            *(warmup_steps, min(max_steps, epochs * length)),
        )
    return {
        "steps": epochs * length,
        "epochs": epochs,
        "warmup_steps": warmup_steps,
        "epoch_length": length * accumulation_steps,
        "iterations": epochs * length * accumulation_steps,
    }
