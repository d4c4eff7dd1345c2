# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A way to load crops in a process of its own, like a worker of a DataLoader, so that its memory can be measured."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from .ways import Job, Loader

START = "spawn"  # a forked process would start with the memory of its parent

_loader: Loader | None = None  # one per process


def _begin(way: str, job: Job) -> None:
    global _loader
    _loader = Loader(way, job)


def _call(method: str, *arguments: Any, **options: Any) -> Any:
    return getattr(_loader, method)(*arguments, **options)


class LoadingProcess:
    """A `Loader` in its own process. Methods raise `BrokenProcessPool` if the process was killed (out of memory)."""

    def __init__(self, way: str, job: Job) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=get_context(START))
        self.pool.submit(_begin, way, job).result()

    def __enter__(self) -> LoadingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def draw_all(self, draws: range, *, cold: bool = False, hashes: bool = False) -> tuple[float, list[str]]:
        """See `Loader.draw_all`."""
        return self.pool.submit(_call, "draw_all", draws, cold=cold, hashes=hashes).result()

    def memory(self) -> dict[str, int]:
        """See `Loader.memory`."""
        return self.pool.submit(_call, "memory").result()
