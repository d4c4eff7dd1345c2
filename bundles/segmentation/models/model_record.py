# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a model file records about its training, as a few facts to report with its scores."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.data.list_fingerprint import fingerprint
from ...common.weights.checkpoint_file import checkpoint_facts
from ...common.weights.dialects import ENCODER
from ...common.weights.recorded_preset import training_of
from ...common.words import shown
from .label_names import recorded_labels

logger = logging.getLogger(__name__)


def model_facts(paths: Sequence[str], *, scans: Sequence[dict]) -> list[dict[str, Any]]:
    """Return for each model which weights it started from, and whether the scored cases are those that it held out.

    Nothing is guessed: facts that a file does not record are None.

    Args:
        paths: files ``model.pt``, one or those of an ensemble.
        scans: the scored cases, ``{"image": path or list of paths}``.

    Returns:
        For each ``{"file", "start", "start_file", "held_out", "preset", "steps"}``. ``start`` is ``scratch``,
        ``encoder`` (a pre-trained encoder), ``model`` (a whole network) or None. ``held_out`` states whether the scans
        are exactly those that its training held out for validation.

    Raises:
        InputError: a file cannot be read.
    """
    return [_facts(path, fingerprint(scans)) for path in paths]


def _facts(path: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    trained = training_of(path) or {}
    of_encoder = sum(str(name).startswith(ENCODER) for name in checkpoint_facts(path).get("model") or ())
    start, start_file = None, None
    if "start" in trained:
        start = "scratch"
        if report := trained["start"]:
            # `load_encoder` loads only tensors of the encoder, `load_model` those of the whole network.
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
    """Return the label names that a trained model records; ``otherwise`` if the file does not exist or has none.

    Args:
        checkpoint: ``model.pt``.
        otherwise: label names of the bundle.
    """
    if not Path(checkpoint).exists():
        return dict(otherwise)
    return dict(recorded_labels(checkpoint_facts(checkpoint), checkpoint) or otherwise)


DEFAULTS = {"fold": None, "folds": None, "seed": 0}


def model_split(checkpoint: str, *, fold: int | str | None, folds: int | None, seed: int | None) -> dict[str, Any]:
    """Return fold, folds and seed: the given values, else those recorded in the model file, else the defaults.

    A given value that differs from the recorded one is logged as a warning: training cases may be scored as new ones.

    Args:
        checkpoint: ``model.pt``.
        fold, folds, seed: None to use the model's.
    """
    record = training_of(checkpoint)
    if record is None:
        logger.warning(
            "%s does not record which cases it was trained on: the scored cases may include some of them", checkpoint
        )
        record = {}
    trained = DEFAULTS | {name: value for name, value in record.items() if name in DEFAULTS}
    asked = {name: value for name, value in (("fold", fold), ("folds", folds), ("seed", seed)) if value is not None}
    for name, value in asked.items():
        if trained[name] != value:
            logger.warning(
                "%s was trained with %s %s; scored with %s, the cases may include some that it was trained on",
                *(checkpoint, name, shown(trained[name]), shown(value)),
            )
    return trained | asked
