# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Records of what is finished, in the output folder: how they are read, and what shows that a file has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...common.files import file_hash, file_stamp

RECORDS = ".propagated"  # folder of the records, in the output
UNEXPECTED = "an unexpected error"


def unexpected(error: Exception) -> str:
    """Return the reason of a scan in which a library failed."""
    return f"{UNEXPECTED}, {type(error).__name__}: {error}"


def file_identity(file: str, folder: str | os.PathLike) -> list[Any]:
    """Return what shows whether a file has changed: size and time, or the content if each run writes the file again.

    Args:
        file: the file.
        folder: output folder of the run, which holds converted DICOM series.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        if Path(file).is_relative_to(folder):
            return [file_hash(file)]
        return file_stamp(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def read_record(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the content of a record, or None if it does not exist, is damaged, or lacks one of the entries."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in names) else None
