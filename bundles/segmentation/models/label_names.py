# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Names of the label values, from a bundle's metadata. Every trained model contains them too."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common.errors import InputError

logger = logging.getLogger(__name__)


def read_labels(metadata: str) -> dict[str, str]:
    """Return the label names of ``metadata.json``: value (as text, like JSON keys) to name. ``"0"`` is the background.

    They are at ``network_data_format/outputs/pred/channel_def``, where the Model Zoo and MONAI Label look for them.

    Raises:
        InputError: the file does not exist.
    """
    if not Path(metadata).is_file():
        raise InputError(f"{metadata} not found. Run inside the bundle's folder, or pass that folder as --bundle_root.")
    content = json.loads(Path(metadata).read_text())
    return dict(content["network_data_format"]["outputs"]["pred"]["channel_def"])


def organ_names(labels: Mapping[int | str, str]) -> dict[int, str]:
    """Return the name of each structure by its value as a number, without the background 0. Keys may be text (JSON)."""
    return {int(value): str(name) for value, name in labels.items() if int(value) != 0}


def names_by_value(labels: Mapping[int | str, str]) -> dict[int, str]:
    """Return the name of each label by its value as a number, background included, in the order of the values."""
    return {value: name for value, name in sorted((int(value), str(name)) for value, name in labels.items())}


def recorded_labels(content: Mapping[str, Any], file: str) -> Mapping[str, str] | None:
    """Return the label names that a model file records; None, with a warning, if they are not names by value.

    Args:
        content: what the file records.
        file: its name, for the warning.
    """
    labels = content.get("labels")
    if labels is None or (isinstance(labels, Mapping) and all(str(value).isdecimal() for value in labels)):
        return labels
    logger.warning("%s records labels that are not names by value (%s ...): they are not used", file, str(labels)[:60])
    return None


def check_labels(labels: Mapping[int | str, str]) -> dict[str, str]:
    """Return the labels sorted by value, after checking that the values are 0 (background), 1, 2, ... like channels.

    Raises:
        InputError: a value is missing, or two values have one name: tables and scores name an organ by it.
    """
    values = sorted(int(value) for value in labels)
    if values != list(range(len(values))) or len(values) < 2:
        raise InputError(
            f"labels {dict(labels)} must have the values 0 (background), 1, 2, ... without a gap; values found: {values}."
        )
    by_name: dict[str, list[int]] = {}
    for value, name in labels.items():
        by_name.setdefault(str(name), []).append(int(value))
    if twice := {name: found for name, found in by_name.items() if len(found) > 1}:
        name, found = next(iter(twice.items()))
        raise InputError(
            f"labels {dict(labels)} give the name {name!r} to the values {' and '.join(map(str, sorted(found)))}: name each "
            "structure differently, or give its voxels one value."
        )
    return {str(value): labels[str(value)] if str(value) in labels else labels[value] for value in values}
