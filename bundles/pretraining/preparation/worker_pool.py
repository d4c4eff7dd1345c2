# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Work shared among processes, of which one may die without taking the others' work along."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


class Died:
    """Stands for the result of a task whose process died, for want of memory mostly."""


def in_processes(function: Callable[[Any], Any], tasks: Iterable[Any], *, workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield each task with its result as soon as it is there.

    Where a process dies, the tasks that were under way are tried again one by one, each in a process alone; the one whose process dies
    again has the result `Died`. An error that ``function`` raises ends the iteration and is raised here. Whatever ends it, no process
    stays: not after Ctrl-C, and not when this process is killed.

    Args:
        function: of a module that the processes can import.
        tasks: pickled, as the results are.
        workers: number of processes; 0 does the work in this one, which then dies with it.
    """
    waiting = deque(tasks)
    if not workers:
        yield from ((task, function(task)) for task in waiting)
        return
    while waiting:
        suspects: list[Any] = []
        with _pool(min(workers, len(waiting))) as pool:
            yield from _until_one_dies(pool, function, waiting, workers, suspects)
        for task in suspects:
            with _pool(1) as pool:
                try:
                    with _no_interrupt():
                        future = pool.submit(function, task)
                    result = future.result()
                except BrokenProcessPool:
                    result = Died()
            yield task, result


def _until_one_dies(
    pool: ProcessPoolExecutor, function: Callable, waiting: deque, workers: int, suspects: list
) -> Iterator[tuple[Any, Any]]:
    """Take from ``waiting`` until it is empty; or add the tasks under way, when a process died, to ``suspects``."""
    running: dict[Future, Any] = {}
    while (waiting and not suspects) or running:
        while waiting and not suspects and len(running) < workers:  # no more, so that what is under way is known
            task = waiting.popleft()
            try:
                with _no_interrupt():
                    running[pool.submit(function, task)] = task
            except BrokenProcessPool:
                suspects.append(task)
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task = running.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                suspects.append(task)
            else:
                yield task, result


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    others = set(multiprocessing.active_children())
    # Spawned: a fork of a process with threads (torch, rich) may hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """A process that is started here never sees Ctrl-C, which reaches the whole group: its parent ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    for name in ("OMP_NUM_THREADS", "BLOSC_NTHREADS"):
        os.environ.setdefault(name, "1")
    warnings.simplefilter("ignore")  # of a reader about a file: what matters ends up in the file's row
    for name in ("nibabel.global", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
