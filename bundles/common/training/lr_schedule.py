# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Learning rate schedule: warm-up, then a cosine that may end above 0. It advances once per step, not per iteration."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.optimizers import WarmupCosineSchedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import InputError
from .steps import ends_step


class CosineToFloor(WarmupCosineSchedule):
    """MONAI's schedule with a lower bound that is a fraction of each parameter group's own learning rate.

    MONAI's ``end_lr`` is one rate for all groups. It would raise the rate of encoder stages that learn more slowly at
    the end of the warm-up.

    Args:
        optimizer: its parameter groups have their own rates, in a fixed proportion.
        warmup_steps: steps of the linear warm-up from 0.
        t_total: steps of the run. After the warm-up, the cosine goes from 1 to 0, and is clipped at the lower bound.
        learning_rate: peak learning rate of the run.
        end_learning_rate: final learning rate of the run. Each group ends at ``end_learning_rate / learning_rate``
            times its own rate.

    Raises:
        InputError: ``end_learning_rate`` is above ``learning_rate``.
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup_steps: int, t_total: int, learning_rate: float, end_learning_rate: float
    ) -> None:
        if end_learning_rate > learning_rate:
            raise InputError(
                f"--end_learning_rate {end_learning_rate} is above --learning_rate {learning_rate}, but the rate decreases to it. Lower it, or set it to 0."
            )
        self.floor = end_learning_rate / learning_rate
        super().__init__(optimizer, warmup_steps=warmup_steps, t_total=t_total)

    def lr_lambda(self, step: int) -> float:
        """Return the factor of each group's rate at a step."""
        factor = super().lr_lambda(step)
        return factor if step < self.warmup_steps else max(factor, self.floor)


class StepSchedule:
    """Handler for `SupervisedTrainer` that advances the schedule once per step.

    MONAI's own handler advances with every iteration, which is too often with gradient accumulation.

    Args:
        lr_scheduler: its ``step()`` is called at the end of each step, also of skipped steps, so that the schedule ends
            with the run.
    """

    def __init__(self, *, lr_scheduler: LRScheduler) -> None:
        self.lr_scheduler = lr_scheduler

    def attach(self, engine: Engine) -> None:
        """Register the handler; it runs after the optimiser."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if ends_step(engine):
            self.lr_scheduler.step()
