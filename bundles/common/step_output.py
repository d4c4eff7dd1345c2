# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What is kept of a training step: its loss."""

from __future__ import annotations

from ignite.engine import Engine
from monai.engines.utils import IterationEvents


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
