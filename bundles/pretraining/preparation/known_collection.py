# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare the prepared scans with what is known about a public collection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ...common.errors import InputError
from .audit import USED

EDGE = 0.1  # the values of a scan may end this far inside the window, as a fraction of its width


def find_collection(name: str, file: str | Path) -> dict[str, Any]:
    """Return the entry of a collection in ``collections.yaml``, including its name.

    Raises:
        InputError: the file or the collection does not exist.
    """
    if not Path(file).is_file():
        raise InputError(f"{file} not found. Run inside the bundle's folder, or pass that folder as --bundle_root.")
    known = ConfigParser.load_config_file(str(file))
    if name not in known:
        raise InputError(f"--collection {name!r} is not one of {', '.join(known)} ({file}).")
    return {"name": name, **known[name]}


def differences(collection: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe where the scans differ from their collection. The first note always compares the number of scans.

    Args:
        collection: from `find_collection`.
        table: rows of the audit.
    """
    used = [row for row in table if row["verdict"] == USED]
    expected = collection["training"] + collection["validation"]
    notes = [
        f"{collection['name']}: {len(used)} scans used, the authors' lists have {collection['training']} + "
        f"{collection['validation']} ({len(used) - expected:+d})"
        + (f"; the collection has {collection['holds']}" if collection["holds"] else "")
    ]
    low, high = collection["hu_window"]
    edge = EDGE * (high - low)
    short = [row["name"] for row in used if row["hu_min"] > low + edge or row["hu_max"] < high - edge]
    if short:
        notes.append(
            f"{collection['name']}: the values of {len(short)} scans, such as {short[0]}, do not span {low:g} to "
            f"{high:g} HU"
        )
    if collection["slice_mm"]:
        coarse = [row["name"] for row in used if max(row["spacing"]) > collection["slice_mm"] + 1e-3]
        if coarse:
            notes.append(
                f"{collection['name']}: {len(coarse)} scans, such as {coarse[0]}, are coarser than its "
                f"{collection['slice_mm']:g} mm"
            )
    return notes
