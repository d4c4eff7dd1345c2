# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check that a resumed run reads the same scans as before, even if their folder was moved."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data_list import first_file


def fingerprint(scans: Sequence[dict]) -> dict[str, Any]:
    """Return the number of scans, and a checksum of their names (file and folder) in order.

    Args:
        scans: ``{"image": path or list of paths}``.
    """
    files = [first_file(scan) for scan in scans]
    names = "\n".join("/".join(Path(file).parts[-2:]) for file in files)
    return {"number": len(files), "sha256": hashlib.sha256(names.encode()).hexdigest()[:16]}
