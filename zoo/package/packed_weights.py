# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights to pack: open them as clients do, and read what they were trained for."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bundles.common.errors import InputError
from bundles.common.weights.checkpoint_file import load_checkpoint_file
from bundles.common.weights.dialects import find_weights

#: Weights that a bundle ships in addition to ``models/model.pt``, if they exist.
BESIDE = {"swin_unetr_pretrain": ("encoder.pt",)}


@dataclass(frozen=True)
class Weights:
    """Information recorded in a ``model.pt``; None or empty if it is not recorded.

    Attributes:
        path: the file.
        task: name of the task.
        row: row of the task as used in training.
        labels: maps label values (as text) to names.
        encoder: encoder record (`bundles.common.weights.encoder_record.FIELDS`).
        trained: settings and results of the training.
    """

    path: Path
    task: str | None
    row: dict[str, Any] | None
    labels: dict[str, str] | None
    encoder: dict[str, Any]
    trained: dict[str, Any]


def open_safely(path: Path) -> Any:
    """Open a checkpoint with plain ``torch.load(weights_only=True)``, as MONAI and MONAI Label do.

    Raises:
        InputError: if that fails, with the reason.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError) as error:
        load_checkpoint_file(path)  # raises an InputError for everything but NumPy numbers, which it accepts
        raise InputError(
            f"{path} contains NumPy numbers, which torch.load(weights_only=True) refuses, so clients could not open "
            "it. Save a file that contains only the state dict."
        ) from error


def read_weights(folder: Path) -> Weights:
    """Read the information recorded in ``model.pt`` of a folder.

    Raises:
        InputError: if it is missing or cannot be opened safely.
    """
    path = folder / "model.pt"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist, but a packed bundle needs weights. Train first, then pass the folder that "
            "contains model.pt with --models OUTPUT_DIR/models."
        )
    content = open_safely(path)
    content = content if isinstance(content, Mapping) else {}

    def recorded(key: str) -> Any:
        value = content.get(key)
        return dict(value) if isinstance(value, Mapping) else None

    task = content.get("task")
    return Weights(
        path=path,
        task=task if isinstance(task, str) else None,
        row=recorded("row"),
        labels=recorded("labels"),
        encoder=recorded("encoder") or {},
        trained=recorded("trained") or {},
    )


def copy_weights(bundle: str, folder: Path, target: Path) -> None:
    """Copy ``model.pt`` and the other weights that the bundle ships to the folder ``target``.

    Raises:
        InputError: if one of the others cannot be opened safely, or is from another training than ``model.pt``.
    """
    target.mkdir(parents=True)
    names = ["model.pt"] + [name for name in BESIDE.get(bundle, ()) if (folder / name).is_file()]
    for name in names:
        if name != "model.pt":
            _check_same_encoder(folder / name, folder / "model.pt")
        shutil.copyfile(folder / name, target / name)


def _check_same_encoder(path: Path, model: Path) -> None:
    """Check that a file contains the same encoder as ``model.pt``."""
    open_safely(path)
    expected, found = find_weights(str(model)).encoder, find_weights(str(path)).encoder
    if expected.keys() != found.keys() or not all(torch.equal(expected[name], found[name]) for name in expected):
        raise InputError(
            f"{path} and {model} contain different encoders, so they are from different trainings. Pass the folder of "
            f"a single training with --models, or remove {path.name}."
        )
