# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""An InputError reaches the user as its message alone; any other error keeps its traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bundles.common.errors import InputError, find_input_error, find_machine_error

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from bundles.common.errors import InputError, report_input_errors
report_input_errors()
{body}
"""
WRAPPED = """
def build():
    try:
        raise InputError("roi_size [95] must divide by 32")
    except ValueError as error:
        raise RuntimeError("Failed to instantiate component") from error
try:
    build()
except RuntimeError as error:
    raise RuntimeError("config is broken") from error
"""


def run(body):
    program = PROGRAM.format(root=str(ROOT), body=body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_input_errors_are_value_errors():
    assert issubclass(InputError, ValueError)


def test_the_input_error_is_found_through_cause_and_context():
    inner = InputError("inner")
    by_cause = RuntimeError("outer")
    by_cause.__cause__ = inner
    by_context = KeyError("outer")
    by_context.__context__ = by_cause
    assert find_input_error(inner) is inner
    assert find_input_error(by_context) is inner
    assert find_input_error(RuntimeError("other")) is None
    assert find_input_error(None) is None


def test_a_wrapped_input_error_ends_the_process_with_its_message_alone():
    ended = run(WRAPPED)
    assert ended.returncode == 1
    assert ended.stderr.strip() == "Stopped: roi_size [95] must divide by 32"


def test_another_error_keeps_its_traceback():
    ended = run("{}['a key']")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback") and "KeyError: 'a key'" in ended.stderr


def test_an_error_of_a_loading_process_is_found_in_its_text():
    text = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "scripts.common.errors.RefusedScan: has 3 of 9 voxels that are NaN\n\nThe above exception was the direct cause\n"
        "scripts.common.errors.InputError: /data/a.nii.gz: has 3 of 9 voxels that are NaN\n\nThe above exception\n"
        "RuntimeError: applying transform <LoadScand>\n"
    )
    assert str(find_input_error(RuntimeError(text))) == "/data/a.nii.gz: has 3 of 9 voxels that are NaN"
    assert str(find_input_error(InputError(text))) == "/data/a.nii.gz: has 3 of 9 voxels that are NaN"
    assert find_input_error(RuntimeError("Caught KeyError in DataLoader worker.\nOriginal Traceback: 'x'")) is None


def test_a_full_disk_ends_the_process_with_the_file_and_the_advice(tmp_path):
    body = "from bundles.common.weights import checkpoint_file as c; import torch\nreal = open\n"
    body += "c.open = lambda path, mode: real('/dev/full', mode)\n"
    body += f"c.save_atomically({{'a': torch.zeros(100000)}}, {str(tmp_path / 'last.pt')!r})"
    ended = run(body)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert f"Stopped: {tmp_path / 'last.pt'} cannot be written: No space left on device." in ended.stderr
    assert "Make room, then repeat the command, a training with --resume true" in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_found_behind_what_a_library_makes_of_it(kind):
    outer = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    outer.__context__ = OSError(kind, "no room", "/data/a.csv")
    assert str(find_machine_error(outer)).startswith("/data/a.csv cannot be written: no room")
    assert find_machine_error(OSError(errno.ENOENT, "not there", "/data/a.csv")) is None


def test_a_file_that_may_not_be_touched_is_named():
    outer = RuntimeError("Failed to instantiate component")
    outer.__cause__ = PermissionError(errno.EACCES, "Permission denied", "/data/a.nii.gz")
    assert str(find_machine_error(outer)).startswith("/data/a.nii.gz: permission denied. Change its owner")


@pytest.mark.parametrize("module", ["zoo.pack", "zoo.verify", "zoo.segment", "evidence.report", "workflow", "demo.run"])
def test_the_command_lines_report_errors_of_the_machine_as_the_bundles_do(module):
    body = f"""
import errno, runpy, sys
sys.excepthook = sys.__excepthook__  # as in a new process
from pathlib import Path
import argparse
def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device", "/data/a.csv")
argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = full
runpy.run_module({module!r}, run_name="__main__")
"""
    ended = run(body)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "Stopped: /data/a.csv cannot be written: No space left on device." in ended.stderr


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "unable to allocate shared memory(shm) for file </torch_26683_39_0>: No space left on device (28)",
            "--num_workers 0",
        ),
        ("unable to write to file </torch_26683_39_0>: No space left on device (28)", "docker run --shm-size"),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
            "shared memory. Please try to raise your shared memory limit.",
            "/dev/shm",
        ),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "a smaller --num_workers or --cache_num"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "A loading process was killed"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "--gradient_checkpointing true"),
    ],
)
def test_a_machine_that_is_too_small_is_told_with_what_to_do(text, advice):
    outer = RuntimeError("Failed")
    outer.__cause__ = RuntimeError(text)
    assert advice in str(find_machine_error(outer))
    assert find_machine_error(RuntimeError("size mismatch")) is None


def test_an_out_of_memory_error_of_torch_is_one_of_these():
    assert "memory of the GPU" in str(find_machine_error(torch.OutOfMemoryError("CUDA out of memory. Tried")))
