# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Between the backward pass and the optimiser: clip the gradient, and leave out a step whose loss or gradient is not finite.

The official loop skips clipping under mixed precision, and never unscales (traps.md 8).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..run.distributed import is_distributed, rank
from .steps import ends_step, steps_done

logger = logging.getLogger(__name__)


class GradientGuard:
    """Handler for `SupervisedTrainer`; leaves the norm of the unscaled, unclipped gradient in ``engine.state.gradient_norm``.

    A step is left out on all ranks or on none. The weights, the moments of the optimiser and the weight decay of such a step are as if it
    had not been; the learning rate and the data go on.

    A fused optimiser is told on the device to leave a step out, so that nothing waits for the GPU; what was left out is read, counted and said
    every few steps, at the end of an epoch and when the engine is terminated. For any other optimiser every step is waited for.

    ``engine.state.skipped_steps`` and ``skipped_in_a_row`` count what was read, and are kept with the state of the engine.

    Args:
        max_norm: upper bound of the 2-norm of the gradient over all parameters; None leaves gradients alone.
        max_skipped_steps: stop the run when so many steps in a row were left out. The scale of fp16 training halves with each, from
            65,536, so that a sound run may leave out about a dozen steps at its start.
        every: steps between two readings. The run may go on for so many steps after the one that is one too many: all that happens in them is
            that steps which are not finite are left out.

    Raises:
        InputError: from the step that is one too many, with what to do.
    """

    def __init__(self, *, max_norm: float | None, max_skipped_steps: int = 20, every: int = 1) -> None:
        self.max_norm = max_norm
        self.max_skipped_steps = max_skipped_steps
        self.every = max(1, every)
        self.finite: torch.Tensor | None = None
        self.left_out: torch.Tensor | None = None  # 1 where the optimiser is to leave the step out, else 0
        self.unread: list[tuple[int, torch.Tensor]] = []
        self.hook: RemovableHandle | None = None

    def attach(self, engine: Engine) -> None:
        """Look at each loss, and at the gradient once per step."""
        engine.state.skipped_steps = engine.state.skipped_in_a_row = 0
        engine.state_dict_user_keys.extend(["skipped_steps", "skipped_in_a_row"])
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.loss_completed)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.backward_completed)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.step_completed)
        for event in (Events.EPOCH_COMPLETED, Events.TERMINATE):
            engine.add_event_handler(event, self.read)

    def started(self, engine: Engine) -> None:
        """Be asked before each step of the optimiser."""
        if self.hook is None:
            self.hook = engine.optimizer.register_step_pre_hook(self.before_step)

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Tell a fused optimiser, in the way of `torch.amp.GradScaler`, whose own finding is kept."""
        if self.left_out is not None:
            found = getattr(optimizer, "found_inf", None)
            optimizer.found_inf = self.left_out if found is None else torch.maximum(found, self.left_out)

    def loss_completed(self, engine: Engine) -> None:
        """Note on the device, without waiting for it, whether the loss is finite."""
        finite = torch.isfinite(engine.state.output["loss"].detach())
        self.finite = finite if self.finite is None else self.finite & finite

    def backward_completed(self, engine: Engine) -> None:
        """Clip; have the step left out if its gradient, or a loss of it, is not finite."""
        if not ends_step(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        parameters = [p for p in engine.network.parameters() if p.grad is not None]
        engine.state.gradient_norm = norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        finite = (self.finite & torch.isfinite(norm)).float()
        self.finite = None
        if is_distributed():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        loss = engine.state.output["loss"].detach()
        self.unread.append((steps_done(engine), torch.stack([finite, loss.float(), norm.float()])))
        if all(group.get("fused") for group in engine.optimizer.param_groups):
            self.left_out = 1 - finite
        elif not finite:
            for parameter in parameters:
                parameter.grad = None

    def step_completed(self, engine: Engine) -> None:
        """Behind the optimiser: read when it is due."""
        if not ends_step(engine):
            return
        if self.left_out is None or steps_done(engine) % self.every == 0:
            self.read(engine)
        self.left_out = None
        if hasattr(engine.optimizer, "found_inf"):  # a gradient scaler has removed it already
            del engine.optimizer.found_inf

    def read(self, engine: Engine) -> None:
        """Count the steps that were left out, and say so: the one place that waits for the GPU."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        for (step, _), (finite, loss, norm) in zip(unread, torch.stack([v for _, v in unread]).tolist(), strict=True):
            if finite:
                engine.state.skipped_in_a_row = 0
                continue
            engine.state.skipped_steps += 1
            engine.state.skipped_in_a_row += 1
            in_a_row = engine.state.skipped_in_a_row
            if rank() == 0:
                logger.warning(
                    "step %d left out: loss %.4g, gradient norm %.4g (%d in a row, %d in all)",
                    *(step, loss, norm, in_a_row, engine.state.skipped_steps),
                )
            if in_a_row >= self.max_skipped_steps:
                raise InputError(
                    f"{in_a_row} steps in a row up to step {step} had a loss or gradient that is not finite. models/last.pt holds the last "
                    "validated weights before them, if there were any. Lower --learning_rate or raise --warmup_steps, look for bad "
                    "voxels with --check_data full, or train without mixed precision (--amp false). To go on from last.pt: "
                    "--resume true --resume_changes \"['learning_rate']\"."
                )
