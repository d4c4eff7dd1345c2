# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The weights that go into a package: opened as clients open them, and asked what they were trained for."""

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

#: Weights beside ``models/model.pt`` that a bundle gives away, where they are there.
BESIDE = {"swin_unetr_pretrain": ("encoder.pt",)}


@dataclass(frozen=True)
class Weights:
    """What a ``model.pt`` says beside its tensors; empty or None where it does not.

    Attributes:
        path: the file.
        task: name of the Decathlon's task.
        row: row of the task, as it was trained.
        labels: value (as text) to name.
        encoder: record of the encoder (`bundles.common.weights.encoder_record.FIELDS`).
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
        InputError: if that does not work, with the reason.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError) as error:
        load_checkpoint_file(path)  # says what is wrong
        raise InputError(
            f"{path} carries numbers of NumPy, which torch.load(weights_only=True) refuses: clients could not open it. "
            "Write a file that holds the state dict alone."
        ) from error


def read_weights(folder: Path) -> Weights:
    """Open ``model.pt`` of a folder.

    Raises:
        InputError: if it is missing or cannot be opened safely.
    """
    path = folder / "model.pt"
    if not path.is_file():
        raise InputError(
            f"{path} is not there: a packed bundle has weights. Train first, and name the folder that then holds model.pt "
            "by --models OUTPUT_DIR/models."
        )
    content = open_safely(path)
    content = content if isinstance(content, Mapping) else {}

    def said(key: str) -> Any:
        value = content.get(key)
        return dict(value) if isinstance(value, Mapping) else None

    task = content.get("task")
    return Weights(
        path=path,
        task=task if isinstance(task, str) else None,
        row=said("row"),
        labels=said("labels"),
        encoder=said("encoder") or {},
        trained=said("trained") or {},
    )


def copy_weights(bundle: str, folder: Path, target: Path) -> None:
    """Copy ``model.pt``, and what else the bundle gives away, to the folder ``target``.

    Raises:
        InputError: if one of them cannot be opened safely, or is of another training than ``model.pt``.
    """
    target.mkdir(parents=True)
    names = ["model.pt"] + [name for name in BESIDE.get(bundle, ()) if (folder / name).is_file()]
    for name in names:
        if name != "model.pt":
            _check_same_encoder(folder / name, folder / "model.pt")
        shutil.copyfile(folder / name, target / name)


def _check_same_encoder(path: Path, model: Path) -> None:
    """A file beside ``model.pt`` holds the same encoder."""
    open_safely(path)
    ours, theirs = find_weights(str(model)).encoder, find_weights(str(path)).encoder
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise InputError(
            f"{path} and {model} hold different encoders: they are of two trainings. Name the folder of one training by --models, "
            f"or take {path.name} out."
        )
