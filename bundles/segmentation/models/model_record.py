# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a trained model's file says of its training, as a few facts that can stand beside its scores."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.data.list_fingerprint import fingerprint
from ...common.weights.checkpoint_file import checkpoint_facts
from ...common.weights.dialects import ENCODER

logger = logging.getLogger(__name__)


def model_facts(paths: Sequence[str], *, scans: Sequence[dict]) -> list[dict[str, Any]]:
    """Return for each model which weights it started from, and whether the scored cases are those that it held out.

    Nothing is guessed: what a file does not say is None.

    Args:
        paths: files ``model.pt``, those of an ensemble or a single one.
        scans: what the models are scored on, ``{"image": path or list of paths}``.

    Returns:
        Of each ``{"file", "start", "start_file", "held_out", "preset", "steps"}``. ``start`` is ``scratch``, ``encoder``
        (a pre-trained encoder), ``model`` (a whole network of whatever history) or None; ``held_out`` whether the scans
        are exactly those that its training left for validation.

    Raises:
        InputError: if a file cannot be read.
    """
    return [_facts(path, fingerprint(scans)) for path in paths]


def training_of(path: str) -> dict[str, Any] | None:
    """What a model's file says of its training, as `TrainingCheckpoint` wrote it; None where it says nothing.

    Raises:
        InputError: if the file cannot be read.
    """
    trained = checkpoint_facts(path).get("trained")
    return trained if isinstance(trained, dict) else None


def _facts(path: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    trained = training_of(path) or {}
    of_encoder = sum(str(name).startswith(ENCODER) for name in checkpoint_facts(path).get("model") or ())
    start, start_file = None, None
    if "start" in trained:
        start = "scratch"
        if report := trained["start"]:
            # `weights.load_encoder` takes tensors of the encoder alone, `load_model` all that the network has.
            start = "model" if report["loaded"] > of_encoder else "encoder"
            start_file = report["file"]
    held_out = trained.get("validation_scans")
    return {
        "file": os.path.abspath(path),
        "start": start,
        "start_file": start_file,
        "held_out": None if held_out is None else held_out == scored,
        "preset": trained.get("preset"),
        "steps": trained.get("steps"),
    }


def model_labels(checkpoint: str, *, otherwise: Mapping[str, str]) -> dict[str, str]:
    """Label names that a trained model carries; ``otherwise`` where the file does not exist or has none.

    Args:
        checkpoint: ``model.pt``.
        otherwise: names of the bundle.
    """
    if not Path(checkpoint).exists():
        return dict(otherwise)
    return dict(checkpoint_facts(checkpoint).get("labels") or otherwise)


DEFAULTS = {"fold": None, "folds": None, "seed": 0}


def model_split(checkpoint: str, *, fold: int | str | None, folds: int | None, seed: int | None) -> dict[str, Any]:
    """What was asked for, else what the model's file says of its training, else the default.

    A difference between the first two is logged as a warning: cases of the training would be scored as if they were new.

    Args:
        checkpoint: ``model.pt``.
        fold, folds, seed: None to take the model's.
    """
    said = training_of(checkpoint)
    if said is None:
        logger.warning(
            "%s does not say which cases it was trained on: they may be among those that it is scored on", checkpoint
        )
        said = {}
    trained = DEFAULTS | {name: value for name, value in said.items() if name in DEFAULTS}
    asked = {name: value for name, value in (("fold", fold), ("folds", folds), ("seed", seed)) if value is not None}
    for name, value in asked.items():
        if trained[name] != value:
            logger.warning(
                "%s was trained with %s %s; scored with %s, cases of its training may count as new ones",
                *(checkpoint, name, trained[name], value),
            )
    return trained | asked
