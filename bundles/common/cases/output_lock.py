# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""One run at a time in an output folder, which leaves no unfinished files behind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import InputError
from ..files import folder_lock


@contextmanager
def alone_in(out: Path, *, lock: Path, doing: str, option: str, folders: Sequence[Path]) -> Iterator[None]:
    """Hold the lock of an output folder; remove unfinished files, also those of a killed run.

    Args:
        out: the output folder, for messages.
        lock: its lock file.
        doing: what another run is doing there, such as "preparing".
        option: the option that names the folder.
        folders: folders in which files are written by `files.atomic_path`.

    Raises:
        InputError: another run holds the lock, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(lock, wait=False))
        except BlockingIOError:
            raise InputError(
                f"Another run is already {doing} {out}: wait until it ends, or choose another {option}."
            ) from None
        except OSError as error:
            raise InputError(f"{option} {out} cannot be written: {error.strerror}. Choose another folder.") from None
        _remove_unfinished(folders)
        try:
            yield
        finally:
            _remove_unfinished(folders)


def _remove_unfinished(folders: Sequence[Path]) -> None:
    for folder in folders:
        for path in folder.glob(".????????.*"):
            if re.match(r"\.[0-9a-f]{8}\.", path.name):
                path.unlink()
