# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check that a resumed run reads the same scans as before, even if their folder was moved."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .list_forms.list_file import first_file


def fingerprint(scans: Sequence[dict]) -> dict[str, Any]:
    """Return the number of scans, and a checksum of their names and sizes in order.

    A name is the path below the deepest folder that contains all the scans, so the folder may be moved and renamed. The
    size in bytes distinguishes sets with the same names, such as ``case_0001.nii.gz``.

    Args:
        scans: ``{"image": path or list of paths}``. A file that does not exist has no size.
    """
    files = [os.path.abspath(first_file(scan)) for scan in scans]
    root = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    names = "\n".join(f"{Path(os.path.relpath(file, root)).as_posix()} {_size(file)}" for file in files)
    return {"number": len(files), "names_and_sizes": hashlib.sha256(names.encode()).hexdigest()[:16]}


def _size(file: str) -> int | None:
    try:
        return os.path.getsize(file)
    except OSError:
        return None
