# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A running mean of the weights over the last steps: often a better network than any one step's, for one more copy of it in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from ignite.engine import Engine, Events
from torch.optim.swa_utils import AveragedModel

from ..errors import InputError
from ..run.distributed import unwrap
from .steps import ends_step

logger = logging.getLogger(__name__)


class WeightAverage:
    """A second copy of the network that holds the mean.

    After step t it moves towards the weights of that step by 1 / min(t, steps): the plain mean of the first ``steps`` steps, and from then on
    an exponential one that reaches back about as far. It smooths the noise that a learning rate above 0 leaves in the weights
    (Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI 2018; Polyak and Juditsky, 1992).

    Args:
        network: that is trained, wrapped or not.
        steps: about how many of the last steps; 1: no mean, the network itself is validated and kept.
        run_steps: of the whole run. A mean that reaches back over more than half of it, warm-up and all, is warned of.
        shorten: take a quarter of the run instead of a mean that reaches back further.

    Attributes:
        network: what to validate and to keep: the mean, or the trained network itself.
        model: torch's record of the mean, with its state; None without one.

    Raises:
        InputError: ``steps`` is no whole number of at least 1.
    """

    def __init__(
        self, *, network: torch.nn.Module, steps: int, run_steps: int | None = None, shorten: bool = False
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"--average_steps {steps!r} must be a whole number of at least 1; 1: no average.")
        if run_steps is not None and shorten:
            steps = min(steps, max(1, run_steps // 4))
        if run_steps is not None and steps > max(1, run_steps / 2):
            logger.warning(
                "--average_steps %d of a run of %d steps: the mean takes in the warm-up, and the network before it could do anything. "
                "Give about a tenth of the run, or 1 for no mean",
                *(steps, run_steps),
            )
        self.steps = steps
        self.trained = unwrap(network)
        self.model = AveragedModel(self.trained, multi_avg_fn=self._move) if steps > 1 else None
        self.network = self.trained if self.model is None else self.model.module

    def _move(self, means: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], _: torch.Tensor) -> None:
        # the counter stays on the CPU: reading it does not wait for the device
        torch._foreach_lerp_(means, weights, 1 / min(int(self.model.n_averaged) + 1, self.steps))

    def update(self) -> None:
        """Take in the weights as they are now."""
        if self.model is not None:
            self.model.update_parameters(self.trained)

    def start_anew(self) -> None:
        """Begin with the network's weights as they are: those of a resumed run that kept no mean."""
        if self.model is not None:
            self.network.load_state_dict(self.trained.state_dict())
            self.model.n_averaged.zero_()


class UpdateAverage:
    """Handler for `SupervisedTrainer`, before the validation handler: takes in the weights at the end of each step.

    Args:
        average: the mean.
    """

    def __init__(self, *, average: WeightAverage) -> None:
        self.average = average

    def attach(self, engine: Engine) -> None:
        """Hook in behind the optimiser."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if ends_step(engine):
            self.average.update()
