# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The learning rate of each step: warm-up, then a cosine that may end above 0. It advances once per step, however many iterations that has."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.optimizers import WarmupCosineSchedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import InputError
from .steps import ends_step


class CosineToFloor(WarmupCosineSchedule):
    """MONAI's schedule, which does not fall below a share of each group's own rate.

    MONAI's ``end_lr`` is one rate for all groups: stages of the encoder that learn more slowly would be raised to it at the end of the warm-up.

    Args:
        optimizer: its groups have rates of their own, in a fixed proportion.
        warmup_steps: linear from 0.
        t_total: steps of the run; the cosine goes from 1 to 0 over those after the warm-up, and is cut off below the floor.
        learning_rate: of the run.
        end_learning_rate: of the run; each group ends at ``end_learning_rate / learning_rate`` times its own rate.

    Raises:
        InputError: if it ends above where it begins.
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup_steps: int, t_total: int, learning_rate: float, end_learning_rate: float
    ) -> None:
        if end_learning_rate > learning_rate:
            raise InputError(
                f"--end_learning_rate {end_learning_rate} is above --learning_rate {learning_rate}: the rate falls to it. Lower it, or give 0."
            )
        self.floor = end_learning_rate / learning_rate
        super().__init__(optimizer, warmup_steps=warmup_steps, t_total=t_total)

    def lr_lambda(self, step: int) -> float:
        """Factor of each group's rate at a step."""
        factor = super().lr_lambda(step)
        return factor if step < self.warmup_steps else max(factor, self.floor)


class StepSchedule:
    """Handler for `SupervisedTrainer`; MONAI's own advances with every iteration, too often under gradient accumulation.

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
