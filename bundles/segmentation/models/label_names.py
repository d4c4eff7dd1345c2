# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which label value is which structure: said once in a bundle's metadata, and kept inside every trained model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from ...common.data.data_list import data_list_labels
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


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")


def check_labels(
    labels: Mapping[str, str], *, dataset_dir: str | None = None, data_list: str | None = None
) -> dict[str, str]:
    """The labels, if they are 0 (background), 1, 2, ... without a gap, as a network's channels are.

    Where a data list declares labels of its own, it must declare the same values, and no name that this run gives to another value:
    scores and masks would carry wrong names. Other spellings (``rkid`` for ``right_kidney``) are logged and let pass.

    Args:
        labels: value to name, of this run.
        dataset_dir: folder of the data list, to compare with; None for no comparison.
        data_list: another list in it.

    Raises:
        InputError: if a value is missing, or the data list contradicts.
    """
    values = sorted(int(value) for value in labels)
    if values != list(range(len(values))) or len(values) < 2:
        raise InputError(
            f"labels {dict(labels)} must be 0 (background), 1, 2, ... without a gap; values found: {values}."
        )
    declared = data_list_labels(dataset_dir, data_list) if dataset_dir is not None else {}
    if declared:
        names = {int(value): _plain(name) for value, name in labels.items()}
        moved = [
            value
            for value, name in declared.items()
            if _plain(name) in names.values() and names.get(value) != _plain(name)
        ]
        if sorted(declared) != values or moved:
            raise InputError(
                f"the data list in {dataset_dir} declares labels {declared}, this run has {dict(labels)}. If the list is right, give "
                f'--labels "{ {str(value): name for value, name in declared.items()} }".'
            )
        other = {name: names[value] for value, name in declared.items() if _plain(name) != names[value] and value}
        if other:
            logger.warning("the data list names its labels otherwise, taken for the same: %s", other)
    return {str(value): labels[str(value)] if str(value) in labels else labels[value] for value in values}
