# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Learning rate schedule: warm-up, then a cosine that may end above 0. It advances once per step, not per iteration."""

from __future__ import annotations

import logging
import math

from ignite.engine import Engine, Events
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import InputError
from .steps import ends_step

logger = logging.getLogger(__name__)


class CosineToFloor(LRScheduler):
    """Linear warm-up from 0, then half a cosine to 0 with a lower bound; before it, optionally, new parts only.

    Without new parts it is MONAI's `WarmupCosineSchedule`, except for the lower bound: MONAI's ``end_lr`` is one rate
    for all groups, which would raise the rate of encoder stages that learn more slowly. Here it is a fraction of each
    parameter group's own rate.

    **New parts first.** For the first ``new_parts_steps`` steps, the rate of all groups whose ``starts_anew`` is False
    is 0; the others warm up over half of these steps, then follow half a cosine to 0. Then all groups warm up together,
    and the cosine spans the remaining steps. The random initial weights of a new part give gradients that would change
    pre-trained weights for no purpose. This is the "sawtooth" of OpenMind (Wald et al., ICCV 2025, arXiv 2412.17041; in
    its code both phases warm up and decay, and the first one is 50 of 1000 epochs, halved in the same way).

    - With a rate of 0, AdamW does not change a weight, not even by weight decay. Its moments are still updated. This is
      on purpose: when the weights begin to move, their second moments are means over many steps, and the bias
      correction is over, so the first updates are not signs of single gradients. It costs time and memory of a full
      backward pass. (OpenMind creates a new optimiser instead.)
    - If all groups start from scratch or none does, there is no first phase: the usual schedule spans all steps. So a
      control from scratch with the same options takes as many steps in total, and trains all of them in full.

    Args:
        optimizer: its parameter groups have their own rates, and ``starts_anew`` (without it: True).
        warmup_steps: steps of the linear warm-up of all groups.
        t_total: steps of the run, including those of the first phase.
        learning_rate: peak learning rate of the run.
        end_learning_rate: final learning rate of the run. Each group ends at ``end_learning_rate / learning_rate``
            times its own rate.
        new_parts_steps: length of the first phase; 0: none.

    Raises:
        InputError: ``end_learning_rate`` is above ``learning_rate``, or the first phase is as long as the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        t_total: int,
        learning_rate: float,
        end_learning_rate: float,
        new_parts_steps: int = 0,
    ) -> None:
        if end_learning_rate > learning_rate:
            raise InputError(
                f"--end_learning_rate {end_learning_rate} is above --learning_rate {learning_rate}, but the rate decreases to it. Lower it, or set it to 0."
            )
        if new_parts_steps and new_parts_steps >= t_total:
            raise InputError(
                f"--new_parts_steps {new_parts_steps} is not below the {t_total} steps of the run: the parts from the file would never learn. "
                "Set about a twentieth of the run, or 0 to train all parts from the first step."
            )
        self.floor = end_learning_rate / learning_rate
        self.warmup_steps, self.t_total, self.new_parts_steps = warmup_steps, t_total, new_parts_steps
        # Part of the state, not an option: a resumed run keeps it even if it is not given the start file again.
        self.starts_anew = [bool(group.get("starts_anew", True)) for group in optimizer.param_groups]
        if new_parts_steps and len(set(self.starts_anew)) == 1:
            logger.info(
                "%s: --new_parts_steps %d has no effect, all parts learn from the first step",
                "all trained parts start anew" if self.starts_anew[0] else "no part starts anew",
                new_parts_steps,
            )
        super().__init__(optimizer)

    @property
    def first_phase(self) -> int:
        """Steps in which only new parts learn."""
        return self.new_parts_steps if len(set(self.starts_anew)) == 2 else 0

    def factor(self, step: int, *, starts_anew: bool) -> float:
        """Return the factor of a group's rate at a step."""
        if step < self.first_phase:
            return _rise_and_fall(step, self.first_phase // 2, self.first_phase) if starts_anew else 0.0
        step, steps = step - self.first_phase, self.t_total - self.first_phase
        factor = _rise_and_fall(step, self.warmup_steps, steps)
        return factor if step < self.warmup_steps else max(factor, self.floor)

    def get_lr(self) -> list[float]:
        """Return the rate of each group at this step."""
        return [
            rate * self.factor(self.last_epoch, starts_anew=anew)
            for rate, anew in zip(self.base_lrs, self.starts_anew, strict=True)
        ]


def _rise_and_fall(step: int, warmup_steps: int, steps: int) -> float:
    """Rise linearly from 0 to 1 over the warm-up, then follow half a cosine to 0 at ``steps``."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


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
