# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Errors that the user can fix, reported as one message instead of a traceback."""

from __future__ import annotations

import re
import sys
import traceback

KINDS = r"\.errors\.(?:InputError|RefusedScan|NoScan)"  # as a traceback names them


class InputError(ValueError):
    """Invalid input. The message says what is wrong, with which value, in which file or key, and what to do."""


def find_input_error(error: BaseException | None) -> InputError | None:
    """Return the first `InputError` among ``error`` and its causes, or None.

    An error of a data loader's process arrives as text, with a traceback instead of its causes.
    """
    while error is not None:
        told = re.findall(rf"{KINDS}: (.*)", str(error)) if "\nOriginal Traceback" in str(error) else []
        if told:
            return InputError(told[-1])  # the outermost
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def report_input_errors() -> None:
    """Let an uncaught `InputError` print only its message, on the last lines of stderr. The exit status stays 1.

    MONAI's config parser wraps the errors of components in one or two ``RuntimeError``: the user would get forty
    lines of traceback with the reason in the middle. All other errors keep their traceback.
    """

    def hook(kind: type[BaseException], error: BaseException, trace) -> None:
        cause = find_input_error(error)
        if cause is None:
            traceback.print_exception(kind, error, trace)
        else:
            print(f"\nStopped: {cause}", file=sys.stderr, flush=True)

    sys.excepthook = hook


class RefusedScan(InputError):
    """Why one scan cannot be used. The code that catches it adds the name of the file or series."""


class NoScan(RefusedScan):
    """Why an object that lies among scans is none, such as a scout view or a report: nothing is missing without it."""
