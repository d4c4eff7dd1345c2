# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Running average of the weights over the last steps, often better than the weights of any single step."""

from __future__ import annotations

import logging

import torch
from ignite.engine import Engine, Events
from torch.optim.swa_utils import AveragedModel

from ..run.distributed import unwrap
from ..value_rules import COUNT
from ..weights.merging_guard import trusted_weights
from .steps import ends_step

logger = logging.getLogger(__name__)


class WeightAverage:
    """A second copy of the network with the average of its weights.

    After step t the average moves towards the current weights by 1 / min(t, steps). This is the arithmetic mean for the
    first ``steps`` steps, then an exponential moving average over roughly as many steps. It reduces the noise that a
    learning rate above 0 leaves in the weights (Izmailov et al., Averaging weights leads to wider optima and better
    generalization, UAI 2018; Polyak and Juditsky, 1992). It needs memory for a second copy of the network.

    Args:
        network: the trained network, with or without ``DistributedDataParallel``.
        steps: average over roughly this many last steps; 1: no average, the network itself is validated and saved.
        run_steps: steps of the whole run. An average over more than half of them is logged as a warning.
        shorten: average over at most a quarter of the run.

    Attributes:
        network: the network to validate and save: the average, or the trained network itself.
        model: torch's `AveragedModel`, with the state to save; None without an average.

    Raises:
        InputError: ``steps`` is not a whole number of at least 1.
    """

    def __init__(
        self, *, network: torch.nn.Module, steps: int, run_steps: int | None = None, shorten: bool = False
    ) -> None:
        COUNT.check("average_steps", steps)
        if run_steps is not None and shorten:
            steps = min(steps, max(1, run_steps // 4))
        if run_steps is not None and steps > max(1, run_steps / 2):
            logger.warning(
                "--average_steps %d of a run of %d steps: the average includes the warm-up and weights that are hardly trained. "
                "Set about a tenth of the run, or 1 for no average",
                *(steps, run_steps),
            )
        self.steps = steps
        self.trained = unwrap(network)
        self.model = AveragedModel(self.trained) if steps > 1 else None
        self.network = self.trained if self.model is None else self.model.module

    def update(self) -> None:
        """Add the current weights to the average.

        Not by `AveragedModel.update_parameters`, which sends its counter to the device, and waits, and copies all
        buffers in every step: the index tables of the attention, which never change. Here integer tables are copied
        only in the first step; running statistics and counters in every step.
        """
        if self.model is None:
            return
        with torch.no_grad():
            # the counter is on the CPU: reading it does not wait for the device
            averaged = int(self.model.n_averaged)
            weight = 1 / min(averaged + 1, self.steps)
            torch._foreach_lerp_(list(self.network.parameters()), list(self.trained.parameters()), weight)
            for mean, buffer in zip(self.network.buffers(), self.trained.buffers(), strict=True):
                is_table = buffer.ndim > 0 and not buffer.is_floating_point()
                if averaged == 0 or not is_table:
                    mean.copy_(buffer)
            self.model.n_averaged += 1

    def start_anew(self) -> None:
        """Restart the average from the network's current weights, for a resumed run that had no average."""
        if self.model is not None:
            with trusted_weights():
                self.network.load_state_dict(self.trained.state_dict())
            self.model.n_averaged.zero_()


class UpdateAverage:
    """Handler for `SupervisedTrainer` that updates the average after each step. Add it before the validation handler.

    Args:
        average: the average to update.
    """

    def __init__(self, *, average: WeightAverage) -> None:
        self.average = average

    def attach(self, engine: Engine) -> None:
        """Register the handler; it runs after the optimiser."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if ends_step(engine):
            self.average.update()
