# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Share work among processes. If one of them dies, the work of the others is kept."""

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


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Died:
    """Result of a task whose process died, in most cases for lack of memory."""

    reason = "its process died, most likely for lack of memory: use fewer --workers"


def in_processes(function: Callable[[Any], Any], tasks: Iterable[Any], *, workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield each task with its result as soon as it is done.

    If a process dies, the tasks in progress are tried again one by one, each in its own process. A task whose process
    dies again has the result `Died`. An error raised by ``function`` ends the iteration and is raised here. No process
    is left behind, neither after Ctrl-C nor when this process is killed.

    Args:
        function: from a module that the processes can import.
        tasks: picklable, as are the results.
        workers: number of processes; 0: do the work in this process, which then dies if a task kills it.
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
    """Work through ``waiting``. If a process dies, stop and add the tasks in progress to ``suspects``."""
    running: dict[Future, Any] = {}
    while (waiting and not suspects) or running:
        while (
            waiting and not suspects and len(running) < workers
        ):  # not more than workers, so that the tasks in progress are known
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
    # spawn: a forked process may hang if its parent has threads (torch, rich).
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
    """Start processes that ignore Ctrl-C, which is sent to the whole process group: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    for name in ("OMP_NUM_THREADS", "BLOSC_NTHREADS"):
        os.environ.setdefault(name, "1")
    warnings.simplefilter("ignore")  # readers warn about files; what matters is in the row of the file
    for name in ("nibabel.global", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
