# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which label value is which structure: said once in a bundle's metadata, and kept inside every trained model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common.errors import InputError

logger = logging.getLogger(__name__)


def read_labels(metadata: str) -> dict[str, str]:
    """Label names of ``metadata.json``, value (as text, JSON's keys) to name, ``"0"`` being the background.

    They stand at ``network_data_format/outputs/pred/channel_def``, where the zoo and MONAI Label look for them.

    Raises:
        InputError: if the file is not there.
    """
    if not Path(metadata).is_file():
        raise InputError(f"{metadata} not found. Run inside the bundle's folder, or name that folder by --bundle_root.")
    content = json.loads(Path(metadata).read_text())
    return dict(content["network_data_format"]["outputs"]["pred"]["channel_def"])


def organ_names(labels: Mapping[int | str, str]) -> dict[int, str]:
    """Name of each structure by its value as a number, text keys (as JSON has them) too; the background, 0, left out."""
    return {int(value): str(name) for value, name in labels.items() if int(value) != 0}


def plain_name(name: Any) -> str:
    """A name in lower case, with one underscore for every run of other characters: ``Left Kidney`` is ``left_kidney``."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")


def check_labels(labels: Mapping[int | str, str]) -> dict[str, str]:
    """Return the labels in the order of their values if these are 0 (background), 1, 2, ... as a network's channels are.

    Raises:
        InputError: a value is missing.
    """
    values = sorted(int(value) for value in labels)
    if values != list(range(len(values))) or len(values) < 2:
        raise InputError(
            f"labels {dict(labels)} must be 0 (background), 1, 2, ... without a gap; values found: {values}."
        )
    return {str(value): labels[str(value)] if str(value) in labels else labels[value] for value in values}
