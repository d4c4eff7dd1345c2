# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Advance the learning rate once per step; MONAI's handler does so once per iteration, too often under gradient accumulation."""

from __future__ import annotations

from ignite.engine import Engine, Events
from torch.optim.lr_scheduler import LRScheduler

from .optimizer_step import ends_step


class StepSchedule:
    """Handler for `SupervisedTrainer`.

    Args:
        lr_scheduler: its ``step()`` is called at the end of each step, skipped ones included, so that the schedule ends with the run.
    """

    def __init__(self, *, lr_scheduler: LRScheduler) -> None:
        self.lr_scheduler = lr_scheduler

    def attach(self, engine: Engine) -> None:
        """Hook in behind the optimiser."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if ends_step(engine):
            self.lr_scheduler.step()
