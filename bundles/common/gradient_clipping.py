# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Clip the gradient norm, with AMP too: the official loop skips clipping under AMP and never unscales (traps.md 8)."""

from __future__ import annotations

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents


class GradientClipping:
    """Handler for `SupervisedTrainer`: bounds the global norm of the unscaled gradient before each optimiser step.

    Args:
        max_norm: upper bound of the 2-norm over all parameters; None leaves gradients alone.
    """

    def __init__(self, *, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Hook in between the backward pass and the optimiser step."""
        if self.max_norm is not None:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)
