# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights to pack: open them as clients do, and read what they were trained for."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from bundles.common.errors import InputError
from bundles.common.weights.checkpoint_file import load_checkpoint_file, save_atomically
from bundles.common.weights.claimed_sizes import check_tensor_sizes, check_unpacked_size
from bundles.common.weights.dialects import find_weights
from bundles.common.weights.plain_facts import check_plain_facts

#: Weights that a bundle ships in addition to ``models/model.pt``, if they exist.
BESIDE = {"swin_unetr_pretrain": ("encoder.pt", "network.pt")}


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
    check_unpacked_size(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        MemoryError,
    ) as error:
        load_checkpoint_file(path)  # raises an InputError for everything except NumPy numbers, which it accepts
        raise InputError(
            f"{path} contains NumPy numbers, which torch.load(weights_only=True) refuses, so clients could not open "
            "it. Save a file that contains only the state dict."
        ) from error
    check_tensor_sizes(content, Path(path))
    return content


#: Records that are written into configs: numbers, lists of numbers, or None.
NUMBERS = ("spacing", "hu_window", "roi_size", "foreground_hu", "foreground", "overlap")
SHAPES = ("in_channels", "feature_size", "depths", "num_heads", "window_size", "patch_size")


def _is_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_numbers, value)) and None not in value
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def read_weights(folder: Path) -> Weights:
    """Read the information recorded in ``model.pt`` of a folder.

    Raises:
        InputError: if it is missing, cannot be opened safely, or has records that are not plain facts.
    """
    path = folder / "model.pt"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist, but a packed bundle needs weights. Train first, then pass the folder that "
            "contains model.pt with --models OUTPUT_DIR/models."
        )
    content = open_safely(path)
    check_plain_facts(content, str(path))
    content = content if isinstance(content, Mapping) else {}
    for record, key in (*(("trained", name) for name in NUMBERS), *(("encoder", name) for name in SHAPES)):
        value = (content.get(record) or {}).get(key) if isinstance(content.get(record), Mapping) else None
        if not _is_numbers(value):
            raise InputError(
                f"{path} was refused: its record {record}::{key} is {value!r}, not a number or a list of numbers, and would "
                "be written into the configs of the bundle. Train again, or do not trust the file."
            )

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


def copy_weights(bundle: str, folder: Path, target: Path, *, half: bool = False) -> None:
    """Copy ``model.pt`` and the other weights that the bundle ships to the folder ``target``.

    Of the data and the start weights that a training records, the names are kept, not the folders of the machine.

    Args:
        bundle: name of the bundle in this repository.
        folder: the folder of the weights.
        target: the new folder.
        half: whether to store numbers in half precision (fp16). A network that loads them computes in fp32 as before,
            from rounded weights.

    Raises:
        InputError: if one of the others cannot be opened safely, or is from another training than ``model.pt``; or a
            weight is too large for half precision.
    """
    target.mkdir(parents=True)
    names = ["model.pt"] + [name for name in BESIDE.get(bundle, ()) if (folder / name).is_file()]
    for name in names:
        if name != "model.pt":
            _check_same_encoder(folder / name, folder / "model.pt")
        content = open_safely(folder / name)
        packed = _without_folders(content)
        if half:
            packed = _halved(packed, folder / name)
        if packed is content:
            shutil.copyfile(folder / name, target / name)
        else:
            save_atomically(packed, target / name)


def _without_folders(content: Any) -> Any:
    """Return a checkpoint whose record of the training names files and folders without their place; itself if it does."""
    trained = content.get("trained") if isinstance(content, Mapping) else None
    if not isinstance(trained, Mapping):
        return content
    changed: dict[str, Any] = {}
    data = trained.get("data")
    names = [Path(each).name for each in data] if isinstance(data, (list, tuple)) else data and Path(data).name
    if names != data:
        changed["data"] = names
    start = trained.get("start")
    if isinstance(start, Mapping) and isinstance(file := start.get("file"), str) and Path(file).name != file:
        changed["start"] = {**start, "file": Path(file).name}
    return {**content, "trained": {**trained, **changed}} if changed else content


def _halved(content: Any, path: Path) -> Any:
    """Return a checkpoint with its floating-point tensors in half precision."""
    if isinstance(content, Mapping):
        return {key: _halved(value, path) for key, value in content.items()}
    if not isinstance(content, torch.Tensor) or not content.is_floating_point():
        return content
    half = content.half()
    if not torch.equal(half.isfinite(), content.isfinite()):
        raise InputError(
            f"{path} has weights up to {content.abs().max():.3g}, too large for half precision (65504). Pack it without --half."
        )
    return half


def _check_same_encoder(path: Path, model: Path) -> None:
    """Check that a file contains the same encoder as ``model.pt``."""
    open_safely(path)
    expected, found = find_weights(str(model)).encoder, find_weights(str(path)).encoder
    if expected.keys() != found.keys() or not all(torch.equal(expected[name], found[name]) for name in expected):
        raise InputError(
            f"{path} and {model} contain different encoders, so they are from different trainings. Pass the folder of "
            f"a single training with --models, or remove {path.name}."
        )
