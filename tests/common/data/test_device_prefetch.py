# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""On a CPU the loader is handed through; on a GPU each batch is copied on a stream of its own, which the step waits for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from monai.data import DataLoader

from bundles.common.data.device_prefetch import DevicePrefetch


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
