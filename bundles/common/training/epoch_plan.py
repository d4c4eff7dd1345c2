# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Convert steps, the user's unit, to epochs of MONAI's trainer. An epoch is the interval between validations."""

from __future__ import annotations

import logging

from ..errors import InputError
from ..run.distributed import world_size
from ..value_rules import COUNT
from ..words import counted, sentence

logger = logging.getLogger(__name__)


def _check_counts(**numbers: object) -> None:
    for name, value in numbers.items():
        COUNT.check(name, value)


def accumulation(*, batch_size: int, accumulation_steps: int, global_batch_size: int | None) -> int:
    """Return the iterations per step for which ``batch_size x processes x iterations`` is the global batch size.

    Args:
        batch_size: volumes per iteration and process.
        accumulation_steps: iterations per step if ``global_batch_size`` is None.
        global_batch_size: volumes per step over all processes, or None.

    Raises:
        InputError: ``batch_size x processes`` does not divide the global batch size, or ``accumulation_steps`` is set
            too.
    """
    _check_counts(batch_size=batch_size, accumulation_steps=accumulation_steps)
    if global_batch_size is None:
        return accumulation_steps
    _check_counts(global_batch_size=global_batch_size)
    at_once = batch_size * world_size()
    if accumulation_steps != 1 or global_batch_size % at_once:
        reason = (
            f"--accumulation_steps {accumulation_steps} is also set: remove it"
            if accumulation_steps != 1
            else f"{world_size()} processes x --batch_size {batch_size} make {at_once} volumes per iteration, which does not divide it: "
            f"choose {max(1, global_batch_size // at_once) * at_once} or {(global_batch_size // at_once + 1) * at_once}, or another number of processes"
        )
        raise InputError(f"--global_batch_size {global_batch_size}: {sentence(reason)}")
    return global_batch_size // at_once


def epochs_of(*, max_steps: int, val_interval: int) -> int:
    """Return the number of equal epochs of at most ``val_interval`` steps that make up ``max_steps``.

    Raises:
        InputError: a value is not a whole number of at least 1.
    """
    _check_counts(max_steps=max_steps, val_interval=val_interval)
    return -(-max_steps // min(val_interval, max_steps))


def epoch_plan(
    *,
    max_steps: int,
    val_interval: int,
    warmup_steps: int = 0,
    new_parts_steps: int = 0,
    accumulation_steps: int = 1,
    epochs: int | None = None,
    scans: int | None = None,
    batch_size: int = 1,
) -> dict[str, int]:
    """Split ``max_steps`` into equal epochs of about ``val_interval`` steps, or plan one epoch per pass over the scans.

    MONAI Label counts passes over the scans. If the warm-up is as long as the run, a warning is logged, because the
    learning rate would never reach its peak.

    Args:
        max_steps, val_interval: steps of the run and between validations; not used for the length of a pass over scans.
        warmup_steps: steps of the learning rate warm-up; with ``scans``, limited to a tenth of the run.
        new_parts_steps: steps before it in which only new parts learn; limited in the same way.
        accumulation_steps: iterations per step.
        epochs: number of epochs; None: as many as ``max_steps`` needs.
        scans: number of scans if an epoch is one pass over them; None: epochs of about ``val_interval`` steps.
        batch_size: volumes per iteration and process, used with ``scans``.

    Returns:
        ``steps``: ``max_steps`` rounded up to a whole number of equal epochs (250 steps with an interval of 100 become
        3 x 84 = 252); ``epochs``; ``warmup_steps``; ``new_parts_steps``; and, in iterations of the engine
        (``accumulation_steps`` per step), ``epoch_length`` and ``iterations``.

    Raises:
        InputError: a value is not a whole number of at least 1.
    """
    usual = epochs_of(max_steps=max_steps, val_interval=val_interval)
    epochs = usual if epochs is None else epochs
    _check_counts(max_epochs=epochs)
    if scans is None:
        length = -(-max_steps // usual)
        if usual * length != max_steps:
            message = "%d steps are rounded up to %d: %d validations, one every %d steps"
            logger.info(message, max_steps, usual * length, usual, length)
    else:
        length = max(1, -(-scans // (batch_size * world_size() * accumulation_steps)))
        warmup_steps, new_parts_steps = (min(n, epochs * length // 10) for n in (warmup_steps, new_parts_steps))
        parts = counted(epochs, "epoch"), counted(length, "step"), counted(scans, "scan")
        logger.info("%s of %s, each a pass over %s", *parts)
    if new_parts_steps + warmup_steps >= min(max_steps, epochs * length):
        logger.warning(
            "the warm-up of %d steps%s is as long as the run of %d: the learning rate never reaches its peak. Set --warmup_steps to about a tenth of the run",
            warmup_steps,
            f" after {new_parts_steps} of new parts" if new_parts_steps else "",
            min(max_steps, epochs * length),
        )
    return {
        "steps": epochs * length,
        "epochs": epochs,
        "warmup_steps": warmup_steps,
        "new_parts_steps": new_parts_steps,
        "epoch_length": length * accumulation_steps,
        "iterations": epochs * length * accumulation_steps,
    }
