# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps and iterations: a step moves the weights; with gradient accumulation it takes several iterations of the engine.

Everything that a user counts (``max_steps``, the log, checkpoints, the schedule) is in steps.
"""

from __future__ import annotations

from ignite.engine import Engine
from monai.engines.utils import IterationEvents


def steps_done(engine: Engine) -> int:
    """Whole steps so far, skipped ones included."""
    return engine.state.iteration // engine.accumulation_steps


def ends_step(engine: Engine) -> bool:
    """Whether the iteration in progress, or just completed, is the last of a step."""
    return engine.state.iteration % engine.accumulation_steps == 0


class StepOutput:
    """Handler for a `SupervisedTrainer` with ``decollate: false``: its output becomes ``[{"loss": tensor}]`` after each step.

    That is the form in which MONAI's own handlers (``--tracking mlflow``, TensorBoard, statistics) read a loss. Decollating would give it
    too, but fetches the loss from the GPU in every step. Crops and predictions are let go before the next step is made.
    """

    def attach(self, engine: Engine) -> None:
        """Replace the output as soon as the step is done."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        engine.state.output = [{"loss": engine.state.output["loss"].detach()}]
