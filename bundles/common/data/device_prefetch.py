# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Copy the next batch to the GPU while it computes the current step, and warn if training waits for the loader."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sized
from typing import Any

import torch

from ..run.distributed import rank

logger = logging.getLogger(__name__)

WATCHED = 60.0  # seconds after which the loader is judged
SLOW = 0.5  # share of these seconds spent waiting


class DevicePrefetch:
    """Data loader that returns images and labels on the GPU; on a CPU, batches of the loader are unchanged.

    If training waited for the loader for more than half of its first minute, a WARNING says so once, with the loader's
    rate and what makes it faster. The first batch is not counted, since workers start then. On a GPU, waiting while the
    steps that are queued are still computed does not count.

    If training never waits for the GPU, it asks for a batch as soon as the previous step is queued. The copy then runs
    at the same time as that step, on a separate stream. This needs a loader with ``pin_memory``; copies from other
    memory wait for the step.

    Args:
        loader: yields dicts of tensors.
        device: device of the training.
        keys: keys to copy. Others, such as the numbers of the draws, are read on the host and stay there.
        cure: sentences for the WARNING: what makes the loader faster. Empty: no WARNING.
    """

    def __init__(
        self,
        *,
        loader: Iterable[dict[str, Any]],
        device: torch.device | str,
        keys: Collection[str] = ("image", "label"),
        cure: str = "",
    ) -> None:
        self.loader = loader
        self.device = torch.device(device)
        self.keys = keys
        self.cure = cure
        self.periods: list[tuple[float, float, Any, Any]] = []
        self.crops = 0

    def __len__(self) -> int:
        """Return the number of batches, if the loader has a length."""
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length.")
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.loader)  # now, not at the first batch: a loader draws a random number when it starts
        batches = self._watched(batches) if self.cure and rank() == 0 else batches
        return self._copied(batches) if self.device.type == "cuda" else batches

    def _watched(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        began: float | None = None  # when the step of the last batch began
        start = None
        while True:
            asked, end = time.monotonic(), self._mark()
            batch = next(batches, None)
            if batch is None:
                return
            came = time.monotonic()
            if began is not None and self.cure:
                self.periods.append((asked - began, came - asked, start, end))
                self.crops += len(batch["image"])
                self._judge()
            began, start = came, self._mark()
            yield batch

    def _mark(self) -> Any:
        """Return an event recorded after the GPU's queued work; None on a CPU, or once the loader is judged."""
        if self.device.type != "cuda" or not self.cure:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _judge(self) -> None:
        seconds = sum(worked + waited for worked, waited, *_ in self.periods)
        if seconds < WATCHED:
            return
        total = sum(_idle(*period) for period in self.periods)
        if total > SLOW * seconds:
            logger.warning(
                "Training waited for its data %.0f%% of its first %.0f seconds: loading gives %.2g crops a second. %s",
                *(100 * total / seconds, seconds, self.crops / seconds, self.cure),
            )
        self.cure = ""  # judged once
        self.periods.clear()

    def _copied(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        stream = torch.cuda.Stream(self.device)
        for batch in batches:
            with torch.cuda.stream(stream):
                copies = {key: batch[key].to(self.device, non_blocking=True) for key in self.keys if key in batch}
            step = torch.cuda.current_stream(self.device)
            step.wait_stream(stream)
            for copy in copies.values():
                copy.record_stream(step)  # otherwise its memory could be reused while the step reads it
            yield {**batch, **copies}


def _idle(worked: float, waited: float, start: Any, end: Any) -> float:
    """Return the seconds of waiting for a batch in which the device had nothing to do.

    Args:
        worked: seconds from the start of the step until all of it was queued.
        waited: seconds from then until the next batch came.
        start, end: events of the device before and after the step; None on a CPU, whose work is done when it is queued.
    """
    if end is None:
        return waited
    end.synchronize()
    still_busy = start.elapsed_time(end) / 1000 - worked
    return max(0.0, waited - max(0.0, still_busy))


def faster_loading(*, volumes: int, cache_num: int, num_workers: int) -> str:
    """Return what makes the loading of whole scans faster: the options of a run with their current values.

    Args:
        volumes: number of scans.
        cache_num: preprocessed volumes kept in memory.
        num_workers: loading processes.
    """
    workers = f"use more loading processes (--num_workers, now {num_workers})"
    if cache_num >= volumes:
        return f"{workers.capitalize()}."
    return f"Keep all volumes in memory (--cache_num {volumes}, now {cache_num}), or {workers}."
