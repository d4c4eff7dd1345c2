# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Ctrl-C and SIGTERM (a scheduler's notice) end a training between two steps, saved, and in the same step on all ranks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from ..run import distributed as processes
from .steps import ends_step, steps_done

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_SIGNAL = 3.0  # seconds in which further signals are the same one: torchrun passes on to its processes what they all have received


class StopSignal:
    """Handler for `SupervisedTrainer`: after a signal the engine terminates without its results, which `TrainingCheckpoint` saves.

    A second signal after a few seconds ends the process at once. ``engine.state.stopped_by`` holds the signal's number for `exit_if_stopped`.

    Args:
        evaluator: the validation engine, so that a long validation is left too, or None.
        every: with several processes, steps from one time that they ask each other to the next: the answer waits for the GPU.
    """

    def __init__(self, *, evaluator: Engine | None = None, every: int = 1) -> None:
        self.evaluator = evaluator
        self.every = max(1, every)
        self.received = 0
        self.received_at = 0.0
        self.former: dict[int, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Listen while the engine runs; signals reach a process's main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            return
        engine.state.stopped_by = 0
        engine.add_event_handler(Events.STARTED, self.take_signals)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step_completed)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.stop_if_asked, engine)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.EXCEPTION_RAISED):
            engine.add_event_handler(event, self.restore_signals)

    def take_signals(self, engine: Engine) -> None:
        """Take over the signals."""
        self.former = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def restore_signals(self, engine: Engine, error: BaseException | None = None) -> None:
        """Give the signals back; ignite leaves raising an error to the handlers of its event."""
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}
        if error is not None:
            raise error

    def receive(self, number: int, frame: Any) -> None:
        """Note the signal; what it interrupted goes on."""
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            logger.info("%s: the run ends after this step and saves (again: at once)", signal.Signals(number).name)
        elif time.monotonic() - self.received_at > ONE_SIGNAL:
            self.restore_signals(None)
            os.kill(os.getpid(), number)

    def step_completed(self, engine: Engine) -> None:
        """Between two steps only: half-accumulated gradients are not saved."""
        if ends_step(engine) and not (processes.is_distributed() and steps_done(engine) % self.every):
            self.stop_if_asked(engine, engine)

    def stop_if_asked(self, engine: Engine, trainer: Engine) -> None:
        """Terminate when any rank was asked to."""
        number = self.received
        if processes.is_distributed():
            asked = torch.tensor([number], device=trainer.state.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            number = int(asked)
        if number:
            trainer.state.stopped_by = number
            for each in {engine, trainer}:
                each.terminate(skip_completed=True)


def exit_if_stopped(engine: Engine) -> None:
    """Behind ``engine.run()``: end the process with the exit status that the signal would have given (128 + its number)."""
    number = getattr(engine.state, "stopped_by", 0)
    if number:
        logger.info(
            "stopped by %s after step %d; the same command with --resume true goes on",
            *(signal.Signals(number).name, steps_done(engine)),
        )
        processes.stop()
        sys.exit(128 + number)


def shield_worker_from_signals(worker: int) -> None:
    """``worker_init_fn`` of a data loader: a signal to the whole process group leaves its processes at work until the run has saved.

    PyTorch lets a worker die of any SIGTERM, and the main process of a dead worker. Here the worker obeys its parent alone, who ends it so.
    Where the system cannot tell who sent a signal (macOS), PyTorch's way stays.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
