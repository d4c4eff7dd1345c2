# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a trained model's file says of its training, as a few facts that can stand beside its scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .checkpoint_dialect import ENCODER
from .checkpoint_file import load_checkpoint_file
from .scan_fingerprint import fingerprint


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


def _facts(path: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    content = load_checkpoint_file(path)
    trained = content.get("trained") if isinstance(content, Mapping) else None
    trained = trained if isinstance(trained, Mapping) else {}
    start, start_file = None, None
    if "start" in trained:
        start = "scratch"
        if report := trained["start"]:
            # `weights.load_encoder` takes tensors of the encoder alone, `load_model` all that the network has.
            of_encoder = sum(name.startswith(ENCODER) for name in content["model"])
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
