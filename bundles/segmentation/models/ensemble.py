# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Several trained models as one: the files that a pattern names, and the networks in them."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...common.data.list_fingerprint import fingerprint
from ...common.errors import InputError
from ...common.networks.swin_unetr import build_swin_unetr
from ...common.weights.encoder_record import resolve_encoder
from ...common.weights.loading import load_model
from .model_record import model_labels, training_of

logger = logging.getLogger(__name__)

#: Settings of a training that decide what its network was shown.
PREPROCESSING = ("spacing", "hu_window", "foreground")


def model_files(pretrained_model: str | Sequence[str], *, optional: bool = False) -> list[str]:
    """The model files that were meant, each once; the first decides labels and split of the run.

    Args:
        pretrained_model: a file, a pattern such as ``runs/fold*/models/model.pt``, or a list of files and patterns.
        optional: let a single file be missing (see `swin_encoder.resolve_encoder`).

    Raises:
        InputError: if a file does not exist, a pattern fits none, or none is named.
    """
    names = [pretrained_model] if isinstance(pretrained_model, (str, os.PathLike)) else list(pretrained_model)
    files: list[str] = []
    for name in map(str, names):
        is_pattern = not os.path.exists(name) and glob.has_magic(name)
        found = sorted(glob.glob(name)) if is_pattern else [name]
        if is_pattern and not found:
            raise InputError(f"--pretrained_model {name!r} fits no file: check the pattern.")
        if not os.path.exists(found[0]) and not (optional and len(names) == 1):
            raise InputError(f"--pretrained_model {name} does not exist: check the path, or make or download the file.")
        files += found
    if not files:
        raise InputError(f"--pretrained_model {pretrained_model!r} names no file.")
    files = list(dict.fromkeys(files))
    if len(files) > 1:
        logger.info("ensemble of %d models: %s", len(files), ", ".join(files))
    return files


def load_ensemble(
    paths: Sequence[str],
    *,
    labels: Mapping[str, str],
    asked: Mapping[str, Any],
    preset: Mapping[str, Any],
    expected: Mapping[str, Any] | None = None,
    fast: bool = True,
) -> list[torch.nn.Module]:
    """The networks of all models but the first, on the CPU; the first is the one that the config builds itself.

    Each is built as its own file says. All see the same preprocessed scan, and so must have been trained on scans preprocessed alike.

    Args:
        paths: of all models; see `model_files`.
        labels: value to name, of the first model.
        asked, preset: see `swin_encoder.resolve_encoder`. With ``in_channels`` in ``asked``, that of the first, a model
            for other channels is refused.
        expected: see `weights.load_model`.
        fast: see `swin_encoder.build_swin_unetr`.

    Raises:
        InputError: if a model has other labels or was trained on scans preprocessed otherwise, or what `resolve_encoder` and `load_model` refuse.
    """
    first = training_of(paths[0]) or {}
    networks = []
    for path in paths[1:]:
        theirs = model_labels(path, otherwise=labels)
        if _by_value(theirs) != _by_value(labels):
            raise InputError(
                f"{path} has the labels {_by_value(theirs)}, {paths[0]} {_by_value(labels)}: an ensemble needs models "
                "of the same classes. Leave one of them out of --pretrained_model."
            )
        trained = training_of(path) or {}
        for name in PREPROCESSING:
            if name in first and name in trained and trained[name] != first[name]:
                raise InputError(
                    f"{path} was trained with {name} {trained[name]}, {paths[0]} with {first[name]}: the members of an ensemble see the same "
                    "preprocessed scan. Leave one of them out of --pretrained_model."
                )
        record = resolve_encoder(asked=asked, preset=preset, checkpoint=path)
        network = build_swin_unetr(record, out_channels=len(labels), fast=fast)
        load_model(network, path, expected=expected)
        networks.append(network.eval())
    return networks


def warn_of_seen_cases(paths: Sequence[str], *, section: str, scans: Sequence[dict]) -> None:
    """Log a warning where a model may have been trained on what it is to be scored on.

    A model's file names the cases that its training held out, by their checksum. With another list, split or ensemble of folds, cases that are scored
    may be cases of the training. Files of others do not say; `model_split` warns of these.

    Args:
        paths: of all models.
        section: of the data list, which is scored.
        scans: what is scored.
    """
    if section == "test":
        return
    scored = fingerprint(scans)
    for path in paths:
        held_out = (training_of(path) or {}).get("validation_scans")
        if held_out != scored and (held_out or len(paths) > 1):
            logger.warning(
                "%s held out other cases in its training (%s) than the %d of section '%s' that are scored: it may have been trained on some of them, "
                "and the scores flatter. A test section scores what no model has seen.",
                *(path, f"{held_out['number']}" if held_out else "not said", scored["number"], section),
            )


def warn_of_unseen_mirrors(paths: Sequence[str], *, mirror_axes: Sequence[int]) -> None:
    """Log a warning where scans are to be mirrored that the training never mirrored: sides would be confused."""
    for path in paths if mirror_axes else ():
        augmentation = (training_of(path) or {}).get("augmentation")
        if not isinstance(augmentation, Mapping):
            continue
        flips = augmentation.get("flip") or 0.0
        unseen = [axis for axis in mirror_axes if not (flips[axis] if isinstance(flips, Sequence) else flips)]
        if unseen:
            logger.warning(
                "%s was trained without flips along the axes %s: --mirror_axes %s shows it scans that it has never seen the like of, and will cost Dice",
                *(path, unseen, list(mirror_axes)),
            )


def _by_value(labels: Mapping[str, str]) -> dict[int, str]:
    return {value: name for value, name in sorted((int(value), name) for value, name in labels.items())}
