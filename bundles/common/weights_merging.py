# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which order of patch merging a file's weights were trained with: nothing in the tensors tells (traps.md 1)."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from .checkpoint_dialect import FoundWeights
from .input_error import InputError
from .patch_merging import MERGING

CATALOGUE = Path(__file__).with_name("known_weights.yaml")


@lru_cache
def _md5(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def known_file(path: str) -> dict[str, Any] | None:
    """The file's row in ``known_weights.yaml``: by name, else by MD5."""
    rows = ConfigParser.load_config_file(CATALOGUE)
    by_name = [row for row in rows if Path(path).name in row["names"]]
    if by_name:
        return by_name[0]
    stat = Path(path).stat()
    digest = _md5(str(path), stat.st_size, stat.st_mtime_ns)
    return next((row for row in rows if row.get("md5") == digest), None)


def merging_of(found: FoundWeights, asked: str | None) -> tuple[str, str]:
    """The order of patch merging, and who says so.

    Args:
        found: the weights.
        asked: ``monai``, ``legacy``, or None where the user leaves it open.

    Raises:
        InputError: if neither the file nor the catalogue nor the user says it, or the user contradicts them.
    """
    if asked is not None and asked not in MERGING:
        raise InputError(f"--merging {asked!r} is not one of {', '.join(MERGING)}.")
    record = found.content.get("encoder")
    known = None
    if isinstance(record, dict) and "merging" in record:
        held, says = record["merging"], "its own encoder record"
    elif known := known_file(found.path):
        held, says = known["merging"], f"the table of known files ({known['what']})"
    elif asked is not None:
        return asked, "--merging"
    else:
        raise InputError(
            f"{found.path} does not say which MONAI its weights were trained with, and is not in {CATALOGUE.name}. MONAI 1.5 changed the order "
            "in which patches are merged, under the same names and shapes: with the wrong one the weights load and compute other features. Give --merging legacy "
            "for weights trained with MONAI 1.4 or older (most that are published), --merging monai for 1.5 or newer."
        )
    if asked not in (None, held):
        raise InputError(f"{found.path} wants --merging {held}, as {says} says, not {asked}. Leave --merging out.")
    return held, says
