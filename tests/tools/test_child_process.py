# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A child process gets its threads and its log, and never outlives what started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import child_process
from tools.child_process import STOP_SIGNALS, Stopped, available_cores, child_environment, raise_on_signals, run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(folder, program, **options):
    options = {"cwd": folder, "log": folder / "log.txt", "threads": 1, "on_poll": lambda output: None, **options}
    return run_python(["-c", program], **options)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_for(happened, seconds=60):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def stop_once(path):
    """A poll callback that raises `Stopped` as soon as the child has written a file."""

    def on_poll(output):
        if path.exists() and path.read_text():
            raise Stopped(signal.SIGTERM)

    return on_poll


def test_log_gets_the_command_and_all_output_after_what_was_there(tmp_path):
    (tmp_path / "log.txt").write_text("earlier\n")
    status = run(tmp_path, "import sys; print('out', flush=True); print('err', file=sys.stderr)", title="cd here; ")
    log = (tmp_path / "log.txt").read_text()
    assert status == 0
    assert log.startswith("earlier\n$ cd here; python -c 'import sys;")
    assert log.endswith("out\nerr\n")


def test_poll_sees_new_output_once_and_nothing_of_before(tmp_path):
    (tmp_path / "log.txt").write_text("earlier\n")
    seen = []
    program = "import time\nfor i in range(3): print('line', i); time.sleep(0.5)\ntime.sleep(1)"
    run(tmp_path, program, on_poll=seen.append)
    assert "".join(seen) == "line 0\nline 1\nline 2\n"
    assert sum(bool(text) for text in seen) >= 2  # while it ran, not at its end


def test_status_is_that_of_the_child(tmp_path):
    assert run(tmp_path, "import sys; sys.exit(7)") == 7
    assert run(tmp_path, "import os; os.kill(os.getpid(), 9)") == -signal.SIGKILL


def test_child_runs_in_its_folder_and_session_with_the_open_descriptor(tmp_path):
    pids = []
    program = "import os; print(os.getcwd(), os.getpid(), os.getsid(0)); os.write(FD, b'x')"
    read, write = os.pipe()
    run(tmp_path, program.replace("FD", str(write)), on_start=pids.append, pass_fds=[write])
    assert os.read(read, 1) == b"x"
    os.close(read), os.close(write)
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == f"{tmp_path} {pids[0]} {pids[0]}"


def test_environment_sets_threads_and_drops_a_foreign_tracking_server(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KEPT", "yes")
    environment = child_environment(3)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    assert [environment[name] for name in names] == ["3", "3", "3"]
    assert "MLFLOW_TRACKING_URI" not in environment and environment["KEPT"] == "yes"
    assert environment["DO_NOT_TRACK"] == environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_TRACKING_URI"] and os.environ["OMP_NUM_THREADS"] == "1"  # only the child's


SAVES_AT_THE_END = """
import os, pathlib, signal, subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
def stop(*_):
    pathlib.Path('saved').touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path('started').write_text(f'{os.getpid()} {grandchild.pid}')
time.sleep(60)
"""


def test_what_is_raised_ends_the_child_and_its_own_processes_in_order(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, SAVES_AT_THE_END, on_poll=stop_once(tmp_path / "started"), patience=30)
    assert (tmp_path / "saved").exists()
    for pid in map(int, (tmp_path / "started").read_text().split()):
        wait_for(lambda pid=pid: not alive(pid), seconds=10)


def test_a_child_that_ignores_the_signal_is_killed_after_the_patience(tmp_path):
    program = (
        "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path('started').write_text(str(os.getpid())); time.sleep(60)"
    )
    began = time.monotonic()
    with pytest.raises(Stopped):
        run(tmp_path, program, on_poll=stop_once(tmp_path / "started"), patience=1.0)
    assert 1 <= time.monotonic() - began < 30
    assert not alive(int((tmp_path / "started").read_text()))


def test_an_error_at_the_start_leaves_no_child(tmp_path):
    pids = []

    def fail(pid):
        pids.append(pid)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, "import time; time.sleep(60)", on_start=fail)
    assert not alive(pids[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux kills the child")
@pytest.mark.parametrize("die_with_parent", [True, False])
def test_a_killed_parent_takes_the_child_along_where_asked(tmp_path, die_with_parent):
    parent = (
        "import sys; from pathlib import Path; from tools.child_process import run_python\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "program = 'import os, pathlib, time; pathlib.Path(\"started\").write_text(str(os.getpid())); time.sleep(60)'\n"
        "run_python(['-c', program], cwd=folder, log=folder / 'log.txt', threads=1, on_poll=lambda output: None,"
        f" die_with_parent={die_with_parent})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    started = tmp_path / "started"
    wait_for(lambda: started.exists() and started.read_text())
    child = int(started.read_text())
    process.kill()
    process.wait()
    if die_with_parent:
        wait_for(lambda: not alive(child), seconds=10)
    else:
        time.sleep(0.5)
        assert alive(child)
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signals_raise_once_with_the_status_of_a_shell(number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    raise_on_signals()
    with pytest.raises(Stopped) as stopped:
        signal.raise_signal(number)
    assert stopped.value.status == 128 + number
    for again in STOP_SIGNALS:  # while the child is ended
        signal.raise_signal(again)


def test_signals_that_are_ignored_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    raise_on_signals()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is child_process._raise_stopped


def test_available_cores_are_those_of_the_process():
    cores = available_cores()
    assert cores >= 1
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert available_cores() == 1
        finally:
            os.sched_setaffinity(0, allowed)
