# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A signal ends a run between two steps, saved; resumed, it is the unbroken run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from bundles.common.training.stop_signal import StopSignal, exit_if_stopped, shield_worker_from_signals


class Signal:
    """Sends this process a signal in one iteration."""

    def __init__(self, iteration, number=signal.SIGTERM):
        self.iteration, self.number = iteration, number

    def __call__(self, engine):
        if engine.state.iteration == self.iteration:
            os.kill(os.getpid(), self.number)


def run(*, at, number=signal.SIGTERM, accumulation_steps=1, evaluate=None, epochs=2, epoch_length=6):
    """Returns the engine and what happened."""
    happened = []
    trainer = Engine(lambda engine, batch: happened.append(engine.state.iteration))
    trainer.accumulation_steps = accumulation_steps
    evaluator = Engine(lambda engine, batch: happened.append(f"case {engine.state.iteration}"))
    trainer.add_event_handler(Events.ITERATION_STARTED, Signal(at, number))
    if evaluate is not None:
        evaluator.add_event_handler(Events.ITERATION_STARTED, Signal(evaluate, number))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(range(3)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: happened.append("epoch"))
    trainer.add_event_handler(Events.COMPLETED, lambda engine: happened.append("completed"))
    trainer.add_event_handler(Events.TERMINATE, lambda engine: happened.append("terminated"))
    StopSignal(evaluator=evaluator).attach(trainer)
    trainer.run(range(epoch_length), max_epochs=epochs)
    return trainer, happened


@pytest.fixture(autouse=True)
def handlers():
    """Handlers are given back."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_is_completed_and_the_result_is_not(number):
    trainer, happened = run(at=3, number=number)
    assert happened == [1, 2, 3, "terminated"]
    assert trainer.state.stopped_by == number
    with pytest.raises(SystemExit) as left:
        exit_if_stopped(trainer)
    assert left.value.code == 128 + number


def test_a_step_of_several_iterations_is_completed():
    _, happened = run(at=4, accumulation_steps=3)
    assert happened == [1, 2, 3, 4, 5, 6, "terminated"]


def test_a_validation_is_cut_short_and_the_epoch_too():
    trainer, happened = run(at=None, evaluate=2)
    assert happened == [1, 2, 3, 4, 5, 6, "case 1", "case 2", "epoch", "terminated"]
    assert trainer.should_terminate


def test_without_a_signal_nothing_changes():
    trainer, happened = run(at=None, epochs=1)
    assert happened == [1, 2, 3, 4, 5, 6, "case 1", "case 2", "case 3", "epoch", "completed"]
    exit_if_stopped(trainer)


def test_an_error_is_raised_and_the_handlers_are_given_back():
    def fail(engine, batch):
        raise ZeroDivisionError

    trainer = Engine(fail)
    trainer.accumulation_steps = 1
    StopSignal().attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.run([0])


class Twice(Signal):
    """Sends the signal twice."""

    def __call__(self, engine):
        super().__call__(engine)
        super().__call__(engine)


def receive_twice():
    steps = []
    trainer = Engine(lambda engine, batch: steps.append(engine.state.iteration))
    trainer.accumulation_steps = 1
    StopSignal().attach(trainer)
    trainer.add_event_handler(Events.ITERATION_STARTED, Twice(2, signal.SIGINT))
    trainer.run(range(5))
    return steps


def test_a_second_signal_at_once_is_the_same_as_torchrun_passes_it_on():
    assert receive_twice() == [1, 2]


def test_a_second_signal_later_ends_at_once(monkeypatch):
    monkeypatch.setattr("bundles.common.training.stop_signal.ONE_SIGNAL", -1.0)
    with pytest.raises(KeyboardInterrupt):
        receive_twice()


def test_other_ranks_are_listened_to(monkeypatch):
    asked = []

    def all_reduce(tensor, op):
        asked.append(int(tensor))
        if len(asked) == 4:
            tensor.fill_(int(signal.SIGTERM))  # another rank was asked to stop

    monkeypatch.setattr("bundles.common.run.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    happened = []
    trainer = Engine(lambda engine, batch: happened.append(engine.state.iteration))
    trainer.accumulation_steps, trainer.state.device = 1, "cpu"
    StopSignal().attach(trainer)
    trainer.run(range(9))
    assert happened == [1, 2, 3, 4] and asked == [0, 0, 0, 0]
    assert trainer.state.stopped_by == signal.SIGTERM


def uneven_validation(rank, folder, asked_in):
    """Rank 0 has three cases and rank 1 two, as of five; all meet again when the validation ends."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    seen = []
    trainer = Engine(lambda engine, batch: None)
    trainer.accumulation_steps, trainer.state.device = 1, "cpu"
    evaluator = Engine(lambda engine, batch: seen.append(batch))
    if rank == 0 and asked_in:
        evaluator.add_event_handler(Events.ITERATION_STARTED, Signal(asked_in))
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: dist.all_reduce(torch.ones(1)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(range(3 - rank)))
    StopSignal(evaluator=evaluator).attach(trainer)
    trainer.run(range(1), max_epochs=2)
    (Path(folder) / str(rank)).write_text(f"{trainer.state.stopped_by} {seen}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("asked_in", "first", "second"),
    [
        (0, "0 [0, 1, 2, 0, 1, 2]", "0 [0, 1, 0, 1]"),
        (2, "15 [0, 1]", "15 [0, 1]"),
        (3, "15 [0, 1, 2]", "15 [0, 1]"),  # in the case that only one rank has: after the next step that all have
    ],
)
def test_ranks_with_unequal_numbers_of_cases_validate_and_stop_together(tmp_path, asked_in, first, second):
    torch.multiprocessing.spawn(uneven_validation, args=(str(tmp_path), asked_in), nprocs=2)
    assert ((tmp_path / "0").read_text(), (tmp_path / "1").read_text()) == (first, second)


def work(ready):
    shield_worker_from_signals(0)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
def test_workers_of_a_loader_obey_their_parent_alone():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    for name in ("TERM", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}; true"], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_run_that_was_not_stopped_goes_on():
    exit_if_stopped(SimpleNamespace(state=SimpleNamespace()))
