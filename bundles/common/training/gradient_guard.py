# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Clip the gradient, and skip steps with a non-finite loss or gradient.

The released pre-training loop (Tang et al., CVPR 2022) skips gradient clipping under mixed precision, and its scaler
never unscales the gradient.
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
    """Handler for `SupervisedTrainer` that clips the gradient and skips non-finite steps.

    The norm of the unscaled, unclipped gradient is in ``engine.state.gradient_norm``.

    A step is skipped on all ranks or on none. A skipped step changes neither the weights (no weight decay) nor the
    moments of the optimiser. The learning rate schedule and the data advance as usual.

    A fused optimiser gets the decision on the device, so that nothing waits for the GPU. Skipped steps are then read,
    counted and logged every few steps, at the end of an epoch, and when the engine is terminated. With any other
    optimiser, every step waits for the GPU.

    ``engine.state.skipped_steps`` and ``skipped_in_a_row`` are the counts. They are part of the engine's state.

    Args:
        max_norm: upper bound of the 2-norm of the gradient over all parameters; None: no clipping.
        max_skipped_steps: stop the run when this many steps in a row were skipped. The scale of fp16 training starts at
            65,536 and halves with each skipped step, so a normal run may skip about a dozen steps at its start.
        every: steps between two readings. The run may continue for up to this many steps after the limit is reached;
            non-finite steps are still skipped.

    Raises:
        InputError: too many steps in a row were skipped; the message states what to do.
    """

    def __init__(self, *, max_norm: float | None, max_skipped_steps: int = 20, every: int = 1) -> None:
        self.max_norm = max_norm
        self.max_skipped_steps = max_skipped_steps
        self.every = max(1, every)
        self.finite: torch.Tensor | None = None
        self.skip: torch.Tensor | None = None  # 1 if the optimiser must skip the step, else 0
        self.unread: list[tuple[int, torch.Tensor]] = []
        self.hook: RemovableHandle | None = None

    def attach(self, engine: Engine) -> None:
        """Check each loss, and the gradient once per step."""
        engine.state.skipped_steps = engine.state.skipped_in_a_row = 0
        engine.state_dict_user_keys.extend(["skipped_steps", "skipped_in_a_row"])
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.loss_completed)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.backward_completed)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.step_completed)
        for event in (Events.EPOCH_COMPLETED, Events.TERMINATE):
            engine.add_event_handler(event, self.read)

    def started(self, engine: Engine) -> None:
        """Register a hook that runs before each step of the optimiser."""
        if self.hook is None:
            self.hook = engine.optimizer.register_step_pre_hook(self.before_step)

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Make a fused optimiser skip the step, as `torch.amp.GradScaler` does; the scaler may also skip it."""
        if self.skip is not None:
            found = getattr(optimizer, "found_inf", None)
            optimizer.found_inf = self.skip if found is None else torch.maximum(found, self.skip)

    def loss_completed(self, engine: Engine) -> None:
        """Record on the device whether the loss is finite, without waiting for the device."""
        finite = torch.isfinite(engine.state.output["loss"].detach())
        self.finite = finite if self.finite is None else self.finite & finite

    def backward_completed(self, engine: Engine) -> None:
        """Clip the gradient; mark the step to be skipped if its gradient or one of its losses is not finite."""
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
            self.skip = 1 - finite
        elif not finite:
            for parameter in parameters:
                parameter.grad = None

    def step_completed(self, engine: Engine) -> None:
        """Read the counts every ``every`` steps, after the optimiser."""
        if not ends_step(engine):
            return
        if self.skip is None or steps_done(engine) % self.every == 0:
            self.read(engine)
        self.skip = None
        if hasattr(engine.optimizer, "found_inf"):  # a gradient scaler would have removed it
            del engine.optimizer.found_inf

    def read(self, engine: Engine) -> None:
        """Count and log the skipped steps. Only this waits for the GPU."""
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
                    "step %d skipped: loss %.4g, gradient norm %.4g (%d in a row, %d in total)",
                    *(step, loss, norm, in_a_row, engine.state.skipped_steps),
                )
            if in_a_row >= self.max_skipped_steps:
                raise InputError(
                    f"{in_a_row} steps in a row up to step {step} had a non-finite loss or gradient. models/last.pt contains the last "
                    "validated weights before them, if any. Lower --learning_rate or raise --warmup_steps, look for bad "
                    "voxels with --check_data full, or train without mixed precision (--amp false). To continue from last.pt: "
                    "--resume true --resume_changes \"['learning_rate']\"."
                )
