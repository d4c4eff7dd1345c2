# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The settings that an output folder was produced with, so that a resumed run does not mix results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...common.files import file_stamp, first_free, write_text
from ...common.run.distributed import rank
from ...common.words import shown
from ..results.organ_volumes import TABLE, read_cases

FILE = "settings.json"


def compare_settings(*, output_dir: str, settings: Mapping[str, Any], models: Sequence[str], resume: bool) -> None:
    """Check what `write_or_compare_settings` will check, and write nothing: the run may still be refused.

    Raises:
        InputError: see `write_or_compare_settings`.
    """
    _compared(output_dir, settings, models, resume)


def write_or_compare_settings(
    *, output_dir: str, settings: Mapping[str, Any], models: Sequence[str], resume: bool
) -> None:
    """Write ``settings.json`` when a run starts; compare the settings with it when a run is resumed.

    The table of volumes, from which a resumed run knows what is done, is renamed first, since it lists masks with other
    settings: to ``previous_volumes.csv``, or to a numbered name if that file lists other scans as well.

    Args:
        output_dir: folder of the results.
        settings: everything that affects the results, of JSON types.
        models: files of the networks, identified by size and modification time.
        resume: whether the run is resumed.

    Raises:
        InputError: a model does not exist; ``settings.json`` cannot be read, or is missing although a table lists masks;
            or the run is resumed with different settings or models. The message lists both values of each.
    """
    current, known = _compared(output_dir, settings, models, resume)
    if known or rank() != 0:
        return
    path = Path(output_dir) / FILE
    _set_table_aside(path.parent / TABLE)
    write_text(path, json.dumps(current, indent=1) + "\n")


def _set_table_aside(table: Path) -> None:
    """Rename a table; an earlier one is replaced if it lists no other scans."""
    if not table.exists():
        return
    scans = _scans(table)
    aside = table.with_name(f"previous_{table.name}")
    os.replace(table, first_free(aside, taken=lambda other: other.exists() and not _scans(other) <= scans))


def _scans(table: Path) -> set[str]:
    """Return the scans of a table; if it is another table, its own name, so that no table replaces it."""
    try:
        return set(read_cases(table))
    except InputError:
        return {str(table)}


def _compared(
    output_dir: str, settings: Mapping[str, Any], models: Sequence[str], resume: bool
) -> tuple[dict[str, Any], bool]:
    """Return the settings as they are written, and whether a resumed run has them already."""
    path = Path(output_dir) / FILE
    stamps = {}
    for model in models:
        if not os.path.exists(model):  # before anything is written: a corrected path would look like another model
            raise InputError(
                f"--pretrained_model {model} does not exist: check the path, or make or download the file."
            )
        stamps[os.path.abspath(model)] = file_stamp(model)
    current = json.loads(json.dumps({**settings, "models": stamps}))  # the form in which it is read back
    if not resume or not (path.exists() or (path.parent / TABLE).exists()):
        return current, False
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict):
        raise InputError(
            f"Cannot resume: {path} is {'damaged' if path.exists() else 'missing'}, so nobody knows the settings of the masks "
            "next to it. Use another --output_dir, or segment all scans again with --resume false."
        )
    changed = [
        f"{name} was {shown(recorded.get(name))}, now {shown(current.get(name))}"
        for name in sorted({*recorded, *current})
        if recorded.get(name) != current.get(name)
    ]
    if changed:
        raise InputError(
            f"Cannot resume: the results in {output_dir} were produced with different settings ({'; '.join(changed)}). "
            "Use those, or another --output_dir."
        )
    return current, True
