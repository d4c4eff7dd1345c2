# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps and iterations: a step is one update of the weights. With gradient accumulation it has several iterations.

Everything that users see (``max_steps``, log, checkpoints, schedule) counts steps.
"""

from __future__ import annotations

from ignite.engine import Engine
from monai.engines.utils import IterationEvents


def steps_done(engine: Engine) -> int:
    """Return the number of completed steps, including skipped ones."""
    return engine.state.iteration // engine.accumulation_steps


def ends_step(engine: Engine) -> bool:
    """Return whether the current (or just completed) iteration is the last of a step."""
    return engine.state.iteration % engine.accumulation_steps == 0


class StepOutput:
    """Handler that replaces the output of a `SupervisedTrainer` with ``[{"loss": tensor}]`` after each iteration.

    For trainers with ``decollate: false``.

    MONAI's own handlers (``--tracking mlflow``, TensorBoard, statistics) read a loss in this form. Decollating would
    also produce it, but it waits for the GPU in every step. This also frees crops and predictions before the next step.
    """

    def attach(self, engine: Engine) -> None:
        """Register the handler; it replaces the output as soon as the step is done."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        engine.state.output = [{"loss": engine.state.output["loss"].detach()}]
