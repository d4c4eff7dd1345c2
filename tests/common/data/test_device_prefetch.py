# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""On a CPU the loader is handed through; on a GPU each batch is copied on a stream of its own, which the step waits for."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from monai.data import DataLoader

from bundles.common.data import device_prefetch
from bundles.common.data.device_prefetch import DevicePrefetch, faster_loading


def loader(number=3, **options):
    items = [{"image": torch.full((1, 4), float(i)), "label": torch.full((1, 4), i), "draw": i} for i in range(number)]
    return DataLoader(items, batch_size=1, **options)


def test_on_a_cpu_it_is_the_loader_as_it_is():
    batches = [{"image": torch.rand(2)}, {"image": torch.rand(2)}]
    prefetch = DevicePrefetch(loader=batches, device="cpu")
    assert all(one is other for one, other in zip(prefetch, batches, strict=True))
    assert len(prefetch) == 2
    with pytest.raises(TypeError, match="generator has no length"):
        len(DevicePrefetch(loader=(batch for batch in batches), device="cpu"))


def test_the_loader_begins_when_it_is_asked_for_an_iterator():
    """A loader takes a number of torch's generator then, before a resumed run puts the generators back."""

    class Loader:
        begun = False

        def __iter__(self):
            self.begun = True
            return iter([])

    for device in ("cpu", "cuda"):
        each = Loader()
        iter(DevicePrefetch(loader=each, device=device))
        assert each.begun


@pytest.fixture
def diary(monkeypatch):
    """A GPU of paper: what would be done on it, in order."""
    lines: list[str] = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            lines.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(which):
        lines.append(f"on {which.name}")
        yield
        lines.append(f"off {which.name}")

    def to(tensor, device, non_blocking):
        assert torch.device(device).type == "cuda" and non_blocking
        lines.append(f"copy {float(tensor.flatten()[0]):g}")
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("step"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, which: lines.append(f"kept for {which.name}"))
    return lines


def test_on_a_gpu_a_batch_is_copied_beside_the_step_and_the_step_waits_for_the_copy(diary):
    for number, batch in enumerate(DevicePrefetch(loader=loader(2), device="cuda", keys=("image", "label"))):
        diary.append(f"step {number}")
        assert float(batch["image"][0, 0, 0]) == number
        assert batch["draw"].tolist() == [number]  # stays on the host, where it is read
    one = ["on side", "copy {0}", "copy {0}", "off side", "step waits for side", 2 * "kept for step;", "step {0}"]
    expected = [part.format(number) for number in (0, 1) for part in one]
    assert ";".join(diary) == ";".join(expected).replace(";;", ";")


class Clock:
    """Time that passes only where a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(device_prefetch, "time", clock)
    return clock


def train(clock, *, loading, step, batches=50, first=0.0, cure="Use a store.", epochs=1):
    """Train with a loader that takes ``loading`` seconds a batch of two crops, and steps that take ``step`` seconds."""

    def load():
        clock.now += first
        for _ in range(batches):
            clock.now += loading
            yield {"image": torch.zeros(2, 1)}

    class Loader:
        def __iter__(self):
            return load()

    prefetch = DevicePrefetch(loader=Loader(), device="cpu", cure=cure)
    for _ in range(epochs):
        for _ in prefetch:
            clock.now += step
        clock.now += 1000.0  # a validation
    return prefetch


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_loader_that_training_waits_for_is_told_once_with_its_rate_and_the_cure(clock, caplog):
    train(clock, loading=3.0, step=1.0, first=500.0, epochs=3)
    assert warnings(caplog) == [
        "Training waited for its data 75% of its first 60 seconds: loading gives 0.5 crops a second. Use a store."
    ]


@pytest.mark.parametrize(
    "run",
    [
        {"loading": 1.0, "step": 3.0, "epochs": 3},
        {"loading": 1.0, "step": 1.01},  # nearly half
        {"loading": 3.0, "step": 1.0, "batches": 15},  # less than a minute: 14 batches after the first
        {"loading": 3.0, "step": 1.0, "cure": ""},
    ],
)
def test_a_loader_that_is_fast_enough_or_was_not_watched_for_a_minute_is_not_told(clock, caplog, run):
    train(clock, **run)
    assert warnings(caplog) == []


class Event:
    """Of a GPU: the time when all that was queued before is done."""

    def __init__(self, at):
        self.at = at

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@pytest.mark.parametrize(("gpu", "told"), [(1.0, False), (0.2, True)])
def test_waiting_behind_queued_steps_of_a_gpu_is_none(clock, caplog, monkeypatch, gpu, told):
    """A loader of 0.9 s a batch, 0.1 s to queue a step: a step of 1 s hides the loading, one of 0.2 s does not."""
    free = 0.0

    def mark(self):
        nonlocal free
        return Event(max(clock.now, free)) if self.cure else None

    def load():
        while True:
            clock.now += 0.9
            yield {"image": torch.zeros(2, 1)}

    monkeypatch.setattr(DevicePrefetch, "_mark", mark)
    for _, _ in zip(DevicePrefetch(loader=load(), device="cpu", cure="Use a store."), range(100), strict=False):
        free = max(clock.now, free) + gpu
        clock.now += 0.1
        clock.now = max(clock.now, free - 2 * gpu)  # a few steps are queued at most
    assert [bool("80% of its first" in line) for line in warnings(caplog)] == [True] * told


def test_only_the_first_process_tells(clock, caplog, monkeypatch):
    monkeypatch.setattr(device_prefetch, "rank", lambda: 1)
    train(clock, loading=3.0, step=1.0)
    assert warnings(caplog) == []


def test_watching_hands_the_batches_through(clock):
    prefetch = DevicePrefetch(loader=loader(3), device="cpu", cure="Use a store.")
    for _ in range(2):
        assert [batch["draw"].item() for batch in prefetch] == [0, 1, 2]
    assert [batch["draw"].item() for batch in islice(prefetch, 2)] == [0, 1]


def test_the_cure_names_the_options_that_help():
    assert faster_loading(volumes=24, cache_num=4, num_workers=2) == (
        "Keep all volumes in memory (--cache_num 24, now 4), or use more loading processes (--num_workers, now 2)."
    )
    assert faster_loading(volumes=4, cache_num=4, num_workers=0) == "Use more loading processes (--num_workers, now 0)."
