# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Errors that the user can fix, reported as one message instead of a traceback."""

from __future__ import annotations

import re
import shutil
import sys
import traceback

from .files import full_disk

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


#: What libraries say about a machine that is too small, and what it means.
TOO_SMALL = (
    (
        r"out of shared memory|shared memory limit|unable to .*</?torch_",
        "The shared memory of this machine (/dev/shm{shm}) is too small for the loading processes. Use --num_workers 0, "
        "or start the container with more: docker run --shm-size 8g.",
    ),
    (
        r"DataLoader worker .*(?:killed by signal: Killed|exited unexpectedly)",
        "A loading process was killed, most likely because the memory was full: use a smaller --num_workers or --cache_num.",
    ),
    (
        r"(?:CUDA|HIP) out of memory",
        "The memory of the GPU is full. In training, use a smaller --batch_size, --crops_per_volume or --roi_size, or "
        "--gradient_checkpointing true; in inference and evaluation, a smaller --sw_batch_size or --batch_size.",
    ),
)


def find_machine_error(error: BaseException | None) -> InputError | None:
    """Return an error that explains a full disk, full memory or denied file among ``error`` and its causes, or None."""
    if (full := full_disk(error)) is not None:
        return InputError(
            f"{full.filename or 'A file'} cannot be written: {full.strerror}. Files that were there are whole. Make room, then "
            "repeat the command, a training with --resume true."
        )
    while error is not None:
        if isinstance(error, PermissionError):
            return InputError(
                f"{error.filename or 'A file'}: permission denied. Change its owner or its permissions, or choose another "
                "file or folder."
            )
        for pattern, meaning in TOO_SMALL:
            if re.search(pattern, str(error)):
                return InputError(meaning.format(shm=_size_of_shared_memory()))
        error = error.__cause__ or error.__context__
    return None


def _size_of_shared_memory() -> str:
    try:
        return f", {shutil.disk_usage('/dev/shm').total / 1e9:.2g} GB"
    except OSError:
        return ""


def report_input_errors() -> None:
    """Let an uncaught `InputError` print only its message, on the last lines of stderr. The exit status stays 1.

    So do errors that `find_machine_error` knows. MONAI's config parser wraps the errors of components in one or two
    ``RuntimeError``: the user would get forty lines of traceback with the reason in the middle. All other errors keep
    their traceback.
    """

    def hook(kind: type[BaseException], error: BaseException, trace) -> None:
        cause = find_input_error(error) or find_machine_error(error)
        if cause is None:
            traceback.print_exception(kind, error, trace)
        else:
            print(f"\nStopped: {cause}", file=sys.stderr, flush=True)

    sys.excepthook = hook


class RefusedScan(InputError):
    """Why one scan cannot be used. The code that catches it adds the name of the file or series."""


class NoScan(RefusedScan):
    """Why an object among scans is not a scan, such as a scout view or a report: nothing is missing without it."""
