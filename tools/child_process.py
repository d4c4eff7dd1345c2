# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a Python command as a child process: threads, log, a clean end, and signals that stop the program.

Used by `demo.run` and `workflow.job`, which run the bundles' commands.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bundles.common.parent_process import end_with_parent
from bundles.common.run.known_lines import without_config_note
from bundles.common.run.worker_pool import available_cores as available_cores  # for whoever starts children

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.3
KILL_PATIENCE = 5.0  # seconds that a killed process may take to disappear


class Stopped(BaseException):
    """Ctrl-C or another stop signal arrived.

    Args:
        signal_number: the signal. ``status`` is the exit status that a shell reports for it.
    """

    def __init__(self, signal_number: int) -> None:
        self.status = 128 + signal_number


def raise_on_signals() -> None:
    """Make Ctrl-C, SIGTERM and SIGHUP raise `Stopped`. Signals that are ignored (nohup) stay ignored."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_stopped)


def _raise_stopped(signal_number: int, _frame: object) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave the child process behind
    raise Stopped(signal_number)


def child_environment(threads: int) -> dict[str, str]:
    """Return the environment of a child: a fixed number of threads, no telemetry, no foreign MLflow server.

    Args:
        threads: number of threads for OpenMP, MKL and OpenBLAS.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return environment | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONWARNINGS": without_config_note(),
    }


def run_python(
    words: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    threads: int,
    on_poll: Callable[[str], None],
    on_start: Callable[[int], None] = lambda pid: None,
    title: str = "",
    patience: float = 5.0,
    die_with_parent: bool = False,
    pass_fds: Sequence[int] = (),
) -> int:
    """Run ``python WORDS`` to its end and append its output to a log.

    The child has a session of its own, so that Ctrl-C reaches only this process. If anything is raised here, such as
    `Stopped`, the child and all its processes are ended first.

    Args:
        words: what follows ``python``.
        cwd: the child's working directory.
        log: gets the command line, then all output. Its folder must exist.
        threads: see `child_environment`.
        on_poll: called about three times a second with the output since the last call.
        on_start: called once with the child's process id.
        title: written before ``python WORDS`` in the first line of the log, such as ``cd FOLDER; ``.
        patience: seconds that the child may take to end after SIGTERM, before SIGKILL.
        die_with_parent: kill the child when this process dies, even by SIGKILL (Linux only).
        pass_fds: file descriptors that the child inherits.

    Returns:
        The exit status; negative if a signal ended the child.
    """
    with open(log, "ab") as written, open(log, errors="replace") as read:
        written.write(f"$ {title}python {shlex.join(words)}\n".encode())
        written.flush()
        read.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=child_environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
            preexec_fn=end_with_parent if die_with_parent else None,
        )
        try:
            on_start(process.pid)
            while (status := _wait(process, POLL_SECONDS)) is None:
                on_poll(read.read())
            return status
        finally:
            _end(process, patience)


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen, patience: float) -> None:
    """End a child with all its processes: SIGTERM, so that it can save its state, then SIGKILL."""
    if process.poll() is not None:
        return
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, KILL_PATIENCE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if _wait(process, seconds) is not None:
            return
