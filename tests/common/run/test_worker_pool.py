# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A process that dies costs its own task alone, and no process outlives the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from bundles.common.run.worker_pool import Died, in_processes

ROOT = Path(__file__).parents[3]


def square(number: int) -> int:
    return number * number


def die_of_some(number: int) -> int:
    """As the system kills a process that takes all memory."""
    if number in (2, 5):
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse_three(number: int) -> int:
    if number == 3:
        raise InputError("the disk is full")
    return number


def where(number: int) -> int:
    return os.getpid()


def write_own_id(folder: str) -> None:
    Path(folder, f"{os.getpid()}.started").write_text("")
    time.sleep(60)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_task_comes_with_its_result(workers):
    assert sorted(in_processes(square, range(6), workers=workers)) == [(number, number * number) for number in range(6)]


def test_no_workers_is_this_process_and_two_are_others():
    assert {result for _, result in in_processes(where, range(3), workers=0)} == {os.getpid()}
    others = {result for _, result in in_processes(where, range(3), workers=2)}
    assert os.getpid() not in others and 1 <= len(others) <= 2


def test_a_process_that_dies_takes_no_other_task_along():
    results = dict(in_processes(die_of_some, range(8), workers=2))
    assert sorted(results) == list(range(8))
    assert {task for task, result in results.items() if isinstance(result, Died)} == {2, 5}
    assert all(results[task] == task for task in (0, 1, 3, 4, 6, 7))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_ends_the_work(workers):
    with pytest.raises(InputError, match="the disk is full"):
        list(in_processes(refuse_three, range(50), workers=workers))


def test_no_tasks_need_no_process():
    assert list(in_processes(square, [], workers=2)) == []


def running(folder: Path) -> list[int]:
    alive = []
    for path in folder.glob("*.started"):
        try:
            state = Path("/proc", path.stem, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        alive += [int(path.stem)] if state != "Z" else []
    return alive


def wait_until(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes run")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_stays_when_the_run_is_ended(tmp_path, number):
    code = (
        "from bundles.common.run.worker_pool import in_processes; from tests.common.run.test_worker_pool import write_own_id; "
        f"list(in_processes(write_own_id, [{str(tmp_path)!r}] * 2, workers=2))"
    )
    # A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + code
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
    run.send_signal(number)
    run.wait(timeout=30)
    assert wait_until(lambda: not running(tmp_path))
