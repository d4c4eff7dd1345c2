# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Errors that a user can mend: one message instead of a traceback."""

from __future__ import annotations

import sys
import traceback


class InputError(ValueError):
    """Bad input: the message says what is wrong, with which value, in which file or key, and what to do."""


def find_input_error(error: BaseException | None) -> InputError | None:
    """Return the `InputError` that ``error`` is or was caused by, if there is one."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _message(error: InputError) -> str:
    """What the user is told: without the traceback that torch puts into the text of an error from a process of a data loader."""
    text = str(error)
    return text.rpartition("InputError: ")[2].strip() if "\nOriginal Traceback" in text else text


def report_input_errors() -> None:
    """Make an uncaught `InputError` end the process with its message alone, on the last lines of stderr, and exit status 1.

    MONAI's config parser wraps what a component raises in one or two ``RuntimeError``; the user would read forty
    lines of traceback with the reason in the middle. All other errors keep their traceback.
    """

    def hook(kind: type[BaseException], error: BaseException, trace) -> None:
        cause = find_input_error(error)
        if cause is None:
            traceback.print_exception(kind, error, trace)
        else:
            print(f"\nStopped: {_message(cause)}", file=sys.stderr, flush=True)

    sys.excepthook = hook


class RefusedScan(InputError):
    """Says why one scan is left out; whoever catches it adds the name of the file or series."""
