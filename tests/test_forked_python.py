# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A forked Python starts and ends as the interpreter does: the same program, started both ways, tells the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from . import forked_python
from .forked_python import ROOT, ForkedPython

PROGRAM = """
import atexit, json, multiprocessing, os, sys, warnings
atexit.register(print, "left")
warnings.warn("not shown")
print(json.dumps({
    "words": sys.argv, "name": __name__, "folder": os.getcwd(), "path": sys.path[0], "mark": os.environ.get("MARK"),
    "inherited": os.environ.get("PYTEST_CURRENT_TEST"), "method": multiprocessing.get_start_method(),
    "project": sorted(name for name in sys.modules if name.partition(".")[0] in ("bundles", "zoo", "demo", "tools")),
}))
print("to stderr", file=sys.stderr)
"""
ENDS = {
    "falls off the end": "",
    "exit status": "sys.exit(3)",
    "message": "sys.exit('Stopped: no')",
    "uncaught": "raise ValueError('no')",
    "interrupted": "raise KeyboardInterrupt",
    "signal": "sys.stdout.flush(); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_it_tells_what_the_interpreter_tells(tmp_path, end):
    (tmp_path / "program.py").write_text(PROGRAM + end)
    words = ["-m", "program", "--a", "b c"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | {"MARK": "1"}
    forked = forked_python.run(words, cwd=tmp_path, env=environment, timeout=120)
    plain = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (forked.returncode, forked.stdout) == (plain.returncode, plain.stdout)
    assert '"mark": "1"' in forked.stdout
    assert forked.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    assert forked.stderr.startswith("to stderr\n")


def test_code_is_run_too():
    done = forked_python.run(["-c", "import sys; print(sys.argv)", "x"], cwd=ROOT, env=dict(os.environ), timeout=120)
    assert (done.returncode, done.stdout) == (0, "['-c', 'x']\n")


def test_it_can_be_signalled_with_its_group_and_gives_up_waiting(tmp_path):
    code = "import time; print('waits', flush=True); time.sleep(60)"
    process = ForkedPython(["-c", code], cwd=tmp_path, env=dict(os.environ), start_new_session=True)
    while "waits" not in process.output:
        assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
