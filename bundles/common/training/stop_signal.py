# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""End a training on Ctrl-C or SIGTERM (sent by schedulers) between two steps, saved, at the same step on all ranks."""

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
# Further signals within these seconds count as the same one: torchrun forwards a signal to processes that have already
# received it.
ONE_SIGNAL = 3.0


class StopSignal:
    """Handler for `SupervisedTrainer` that terminates the engine after a signal; `TrainingCheckpoint` saves the state.

    A second signal after a few seconds ends the process at once. ``engine.state.stopped_by`` is the signal's number,
    for `exit_if_stopped`.

    Args:
        evaluator: the validation engine, so that a long validation is interrupted too, or None.
        every: with several processes, steps between two exchanges of received signals. Each exchange waits for the GPU.
    """

    def __init__(self, *, evaluator: Engine | None = None, every: int = 1) -> None:
        self.evaluator = evaluator
        self.every = max(1, every)
        self.received = 0
        self.received_at = 0.0
        self.cases_of_all = 0  # iterations of a validation that every rank has: some have one more
        self.former: dict[int, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Register the handlers. Signals are handled while the engine runs, and only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        engine.state.stopped_by = 0
        engine.add_event_handler(Events.STARTED, self.take_signals)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step_completed)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.EPOCH_STARTED, self.validation_started, engine)
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.case_completed, engine)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.EXCEPTION_RAISED):
            engine.add_event_handler(event, self.restore_signals)

    def take_signals(self, engine: Engine) -> None:
        """Install the signal handlers."""
        self.former = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def restore_signals(self, engine: Engine, error: BaseException | None = None) -> None:
        """Restore the former signal handlers, and raise ``error``: ignite leaves that to the handlers of its event."""
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}
        if error is not None:
            raise error

    def receive(self, number: int, frame: Any) -> None:
        """Record the signal; the interrupted code continues."""
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            logger.info(
                "%s: saving and ending after this step (send it again to end at once)", signal.Signals(number).name
            )
        elif time.monotonic() - self.received_at > ONE_SIGNAL:
            self.restore_signals(None)
            os.kill(os.getpid(), number)

    def step_completed(self, engine: Engine) -> None:
        """Stop only between two steps, because partly accumulated gradients are not saved."""
        if ends_step(engine) and not (processes.is_distributed() and steps_done(engine) % self.every):
            self.stop_if_asked(engine, engine)

    def validation_started(self, evaluator: Engine, trainer: Engine) -> None:
        """Agree on the number of iterations that every rank has: an exchange in a further one would wait forever."""
        self.cases_of_all = evaluator.state.epoch_length
        if processes.is_distributed():
            least = torch.tensor([self.cases_of_all], device=trainer.state.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            self.cases_of_all = int(least)

    def case_completed(self, evaluator: Engine, trainer: Engine) -> None:
        """Stop a validation, too."""
        if evaluator.state.iteration <= self.cases_of_all:
            self.stop_if_asked(evaluator, trainer)

    def stop_if_asked(self, engine: Engine, trainer: Engine) -> None:
        """Terminate if any rank has received a signal."""
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
    """Exit after ``engine.run()`` with the status of the signal (128 + its number) if one stopped the run."""
    number = getattr(engine.state, "stopped_by", 0)
    if number:
        logger.info(
            "stopped by %s after step %d; to continue, run the same command with --resume true",
            *(signal.Signals(number).name, steps_done(engine)),
        )
        processes.stop()
        sys.exit(128 + number)


def shield_worker_from_signals(worker: int) -> None:
    """Keep a data loader's worker alive until the run has saved, after a signal to the whole process group.

    Use it as ``worker_init_fn``. By default, a worker dies on any SIGTERM, and the main process fails when a worker
    dies. Here the worker accepts SIGTERM only from its parent, which ends it this way. On systems that do not report
    the sender of a signal (macOS), PyTorch's default behaviour remains.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
