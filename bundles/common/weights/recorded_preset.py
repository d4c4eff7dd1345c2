# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Choose the preset of a run on a trained model: what the model says is what runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run.presets import preset_names
from .checkpoint_file import checkpoint_facts

logger = logging.getLogger(__name__)


def recorded_training(checkpoint: str | None) -> Mapping[str, Any]:
    """Return what a model file records about its training; empty if it records nothing or does not exist (yet)."""
    if checkpoint is None or not Path(checkpoint).exists():
        return {}
    return training_of(checkpoint) or {}


def training_of(path: str) -> dict[str, Any] | None:
    """Return what `TrainingCheckpoint` recorded about the training in a model file; None if there is no such record.

    Raises:
        InputError: the file cannot be read.
    """
    trained = checkpoint_facts(path).get("trained")
    return trained if isinstance(trained, dict) else None


def preset_of_run(*, preset: str | None, checkpoint: str | None, file: str) -> str:
    """Return the preset: as asked, else the one that the model was trained with, else the first one of the file.

    A preset other than the model's, and a model that records none, are logged as warnings.

    Args:
        preset: the option; None for the model's.
        checkpoint: ``model.pt``. A file that does not exist (yet) records nothing, without a warning.
        file: ``configs/presets.yaml``.

    Raises:
        InputError: ``file`` does not exist, or the model file cannot be read.
    """
    names = preset_names(file)
    recorded = recorded_training(checkpoint).get("preset")
    if preset is not None:
        if recorded not in (None, preset):
            logger.warning(
                "%s was trained with --preset %s; this run uses %s for what the model does not record",
                *(checkpoint, recorded, preset),
            )
        return preset
    if recorded in names:
        return recorded
    if checkpoint is not None and Path(checkpoint).exists():
        logger.warning(
            "%s does not record a preset of this bundle: values that it does not record are those of --preset %s",
            *(checkpoint, names[0]),
        )
    return names[0]
