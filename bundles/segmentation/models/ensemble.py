# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Ensembles of trained models: find the files that match a pattern, and load their networks."""

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
from ...common.weights.recorded_preset import training_of
from ...common.words import listed, shown
from .label_names import names_by_value
from .model_record import model_labels

logger = logging.getLogger(__name__)

#: Files with the weights of one training.
CHECKPOINTS = ("model.pt", "best.pt", "last.pt")
#: Training settings that all members of an ensemble must share.
PREPROCESSING = ("spacing", "hu_window", "foreground")


def model_files(pretrained_model: str | Sequence[str], *, optional: bool = False) -> list[str]:
    """Return the model files without duplicates. The first one decides the labels and the split of the run.

    Args:
        pretrained_model: a file, a pattern such as ``runs/fold*/models/model.pt``, or a list of files and patterns.
        optional: allow a single file to be missing (see `resolve_encoder`).

    Raises:
        InputError: a file does not exist, a pattern matches no file, or the list is empty.
    """
    names = [pretrained_model] if isinstance(pretrained_model, (str, os.PathLike)) else list(pretrained_model)
    files: list[str] = []
    for name in map(str, names):
        is_pattern = not os.path.exists(name) and glob.has_magic(name)
        found = sorted(glob.glob(name)) if is_pattern else [name]
        if is_pattern and not found:
            raise InputError(f"--pretrained_model {name!r} fits no file: check the pattern.")
        if is_pattern:
            _refuse_one_run_twice(name, found)
        if not os.path.exists(found[0]) and not (optional and len(names) == 1):
            raise InputError(f"--pretrained_model {name} does not exist: check the path, or make or download the file.")
        files += found
    if not files:
        raise InputError(f"--pretrained_model {pretrained_model!r} names no file.")
    files = list(dict.fromkeys(files))
    if len(files) > 1:
        logger.info("ensemble of %d models: %s", len(files), ", ".join(files))
    return files


def _refuse_one_run_twice(pattern: str, found: Sequence[str]) -> None:
    """Refuse a pattern that fits several files of one run: its best weights are in two of them, its last in another.

    Raises:
        InputError: names the folder and the files.
    """
    of_run: dict[str, list[str]] = {}
    for file in found:
        if os.path.basename(file) in CHECKPOINTS:
            of_run.setdefault(os.path.dirname(file), []).append(os.path.basename(file))
    for folder, names in of_run.items():
        if len(names) > 1:
            raise InputError(
                f"--pretrained_model {pattern!r} fits {listed(names)} of one run ({folder}), which would count several times. "
                "Name one file of each run, such as 'runs/fold*/models/model.pt'."
            )


def load_ensemble(
    paths: Sequence[str],
    *,
    labels: Mapping[str, str],
    asked: Mapping[str, Any],
    preset: Mapping[str, Any],
    expected: Mapping[str, Any] | None = None,
    fast: bool = True,
) -> list[torch.nn.Module]:
    """Load the networks of all models except the first, on the CPU. The config builds the first one itself.

    Each network is built as recorded in its file. All get the same preprocessed scan, so all must have been trained
    with the same preprocessing.

    Args:
        paths: all model files; see `model_files`.
        labels: label names of the first model by value.
        asked, preset: see `resolve_encoder`. If ``asked`` has the ``in_channels`` of the first model, models for
            another number of channels are rejected.
        expected: see `load_model`.
        fast: see `build_swin_unetr`.

    Raises:
        InputError: a model has different labels or was trained with different preprocessing; or see `resolve_encoder`
            and `load_model`.
    """
    first = training_of(paths[0]) or {}
    networks = []
    for path in paths[1:]:
        model_names = model_labels(path, otherwise=labels)
        if names_by_value(model_names) != names_by_value(labels):
            raise InputError(
                f"{path} has the labels {names_by_value(model_names)}, {paths[0]} {names_by_value(labels)}: all models of an "
                "ensemble must have the same classes. Remove one of them from --pretrained_model."
            )
        trained = training_of(path) or {}
        for name in PREPROCESSING:
            if name in first and name in trained and trained[name] != first[name]:
                raise InputError(
                    f"{path} was trained with {name} {trained[name]}, {paths[0]} with {first[name]}: all models of an "
                    "ensemble must have the same preprocessing. Remove one of them from --pretrained_model."
                )
        record = resolve_encoder(asked=asked, preset=preset, checkpoint=path)
        network = build_swin_unetr(record, out_channels=len(labels), fast=fast)
        load_model(network, path, expected=expected)
        networks.append(network.eval())
    return networks


def warn_of_seen_cases(paths: Sequence[str], *, section: str, scans: Sequence[dict]) -> None:
    """Warn if a model may have been trained on cases that it is scored on.

    A model file records a checksum of the cases that its training held out. With another data list or split, or an
    ensemble of folds, the scored cases may include training cases. `model_split` warns about files without such a
    record.

    Args:
        paths: all model files.
        section: the section of the data list that is scored.
        scans: the scored cases.
    """
    if section == "test":
        return
    scored = fingerprint(scans)
    for path in paths:
        held_out = (training_of(path) or {}).get("validation_scans")
        if held_out != scored and (held_out or len(paths) > 1):
            logger.warning(
                "%s held out other cases in its training (%s) than the %d scored ones of section '%s'. It may have been "
                "trained on some of them, so the scores may be too high. Cases of a test section are new to every model.",
                *(path, f"{held_out['number']}" if held_out else "not recorded", scored["number"], section),
            )


def warn_of_unseen_mirrors(paths: Sequence[str], *, mirror_axes: Sequence[int]) -> None:
    """Warn about mirroring along axes that were not flipped in training: left and right would be confused."""
    for path in paths if mirror_axes else ():
        augmentation = (training_of(path) or {}).get("augmentation")
        if not isinstance(augmentation, Mapping):
            continue
        flips = augmentation.get("flip") or 0.0
        unseen = [axis for axis in mirror_axes if not (flips[axis] if isinstance(flips, Sequence) else flips)]
        if unseen:
            logger.warning(
                "%s was trained without flips along the axes %s, so --mirror_axes %s usually lowers its Dice",
                *(path, shown(unseen), shown(list(mirror_axes))),
            )
