# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Between the backward pass and the optimiser: clip the gradient, and leave out a step whose loss or gradient is not finite.

The official loop skips clipping under mixed precision, and never unscales (traps.md 8).
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai.engines.utils import IterationEvents

from .distributed import is_distributed, rank
from .input_error import InputError
from .optimizer_step import ends_step, steps_done

logger = logging.getLogger(__name__)


class GradientGuard:
    """Handler for `SupervisedTrainer`; leaves the norm of the unscaled, unclipped gradient in ``engine.state.gradient_norm``.

    A step is left out on all ranks or on none. The weights, the moments of the optimiser and the weight decay of such a step are as if it
    had not been; the learning rate and the data go on.

    ``engine.state.skipped_steps`` and ``skipped_in_a_row`` count, and are kept with the state of the engine.

    Args:
        max_norm: upper bound of the 2-norm of the gradient over all parameters; None leaves gradients alone.
        max_skipped_steps: stop the run when so many steps in a row were left out. The scale of fp16 training halves with each, from
            65,536, so that a sound run may leave out about a dozen steps at its start.

    Raises:
        InputError: from the step that is one too many, with what to do.
    """

    def __init__(self, *, max_norm: float | None, max_skipped_steps: int = 20) -> None:
        self.max_norm = float("inf") if max_norm is None else max_norm
        self.max_skipped_steps = max_skipped_steps
        self.finite: torch.Tensor | None = None

    def attach(self, engine: Engine) -> None:
        """Look at each loss, and at the gradient once per step."""
        engine.state.skipped_steps = engine.state.skipped_in_a_row = 0
        engine.state_dict_user_keys.extend(["skipped_steps", "skipped_in_a_row"])
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.loss_completed)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.backward_completed)

    def loss_completed(self, engine: Engine) -> None:
        """Note on the device, without waiting for it, whether the loss is finite."""
        finite = torch.isfinite(engine.state.output["loss"].detach())
        self.finite = finite if self.finite is None else self.finite & finite

    def backward_completed(self, engine: Engine) -> None:
        """Clip; drop the gradient if it, or a loss of this step, is not finite."""
        if not ends_step(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        parameters = [p for p in engine.network.parameters() if p.grad is not None]
        engine.state.gradient_norm = norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        finite = (self.finite & torch.isfinite(norm)).float()
        self.finite = None
        if is_distributed():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if bool(finite):
            engine.state.skipped_in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        engine.state.skipped_steps += 1
        engine.state.skipped_in_a_row += 1
        in_a_row = engine.state.skipped_in_a_row
        if rank() == 0:
            logger.warning(
                "step %d left out: loss %.4g, gradient norm %.4g (%d in a row, %d in all)",
                *(steps_done(engine), engine.state.output["loss"].detach(), norm, in_a_row, engine.state.skipped_steps),
            )
        if in_a_row >= self.max_skipped_steps:
            raise InputError(
                f"{in_a_row} steps in a row up to step {steps_done(engine)} had a loss or gradient that is not finite. models/last.pt holds the last "
                "validated weights before them, if there were any. Lower --learning_rate or raise --warmup_steps, look for bad "
                "voxels with --check_data full, or train without mixed precision (--amp false). To go on from last.pt: "
                "--resume true --resume_changes \"['learning_rate']\"."
            )
