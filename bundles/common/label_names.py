# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which label value is which structure: said once in a bundle's metadata, and kept inside every trained model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .checkpoint_file import load_checkpoint_file
from .input_error import InputError


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


def model_labels(checkpoint: str, *, otherwise: Mapping[str, str]) -> dict[str, str]:
    """Label names that a trained model carries; ``otherwise`` where the file does not exist or has none.

    Args:
        checkpoint: ``model.pt``.
        otherwise: names of the bundle.
    """
    if not Path(checkpoint).exists():
        return dict(otherwise)
    content = load_checkpoint_file(checkpoint)
    return dict(content.get("labels") or otherwise) if isinstance(content, Mapping) else dict(otherwise)


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels, if they are 0 (background), 1, 2, ... without a gap, as a network's channels are.

    Raises:
        InputError: if a value is missing.
    """
    values = sorted(int(value) for value in labels)
    if values != list(range(len(values))) or len(values) < 2:
        raise InputError(
            f"labels {dict(labels)} must be 0 (background), 1, 2, ... without a gap; values found: {values}."
        )
    return {str(value): labels[str(value)] if str(value) in labels else labels[value] for value in values}
