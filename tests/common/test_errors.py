# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""An InputError reaches the user as its message alone; any other error keeps its traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bundles.common.errors import InputError, find_input_error

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
