# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The entries of a cross-validation or of the Decathlon: which tasks, folds and arms, with which options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from bundles.common.errors import InputError
from evidence.study.reading import build, read_entries
from evidence.study.study import Entries, Minutes, Name, Options, Seed

PRETRAINING = "pretraining"  # as the weights of an arm: the encoder of this workflow's own pre-training
OWN = "own"  # value of `task`: a row is proposed for the data


def _all_different(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("contains a value twice")
    return values


class OwnPretraining(Entries):
    """A pre-training from which arms start.

    Attributes:
        scans: folder, or folders, of unlabelled CT (DICOM, NIfTI, MetaImage), or a data list.
        prepare: options of ``prepare.yaml``, which checks the scans and packs them into a patch store first; None: the
            training reads the scans as they are.
        options: options of its training.
        minutes: rough minutes of the training.
    """

    what: ClassVar[str] = "a pre-training"

    scans: str | list[str]
    prepare: dict[str, Any] | None = None
    options: Options = {}
    minutes: Minutes = 600.0


class FoldArm(Entries):
    """One way to train every fold.

    Attributes:
        encoder: ``encoder.pt`` to start from, or ``pretraining``: that of this workflow. None: from scratch.
        modalities: the modalities to train in this way, such as [CT] for an encoder that has seen only CT. None: all.
        training: options of its training.
    """

    what: ClassVar[str] = "an arm"

    encoder: str | None = None
    modalities: Annotated[list[str], Field(min_length=1)] | None = None
    training: Options = {}


class Folds(Entries):
    """A cross-validation of one task, or of the Decathlon; workflow/examples explains each entry.

    Attributes:
        name: name of the cross-validation.
        task: a task of ``tasks.yaml``, a file with a row, or ``own``: a row is proposed for the data. None: all tasks of
            the Decathlon whose folders are in ``data``, or ``tasks``.
        tasks: tasks of the Decathlon.
        data: folder of the task, or for several tasks the folder that contains their folders.
        folds: number of folds, by patient.
        seed: seed of the folds and of every training.
        arms: name to `FoldArm`.
        pretraining: the pre-training from which arms may start.
        training: options of ``train.yaml`` of swin_unetr_msd for every fold.
        training_of: task to further options.
        evaluation: options of ``evaluate.yaml``.
        ensemble: the arms whose folds segment further scans together: of each task, the first that it has. Empty: no
            arm.
        scans: what the ensemble segments: a folder, file or data list. None: the test section of each task's list.
        inference: options of ``inference.yaml``.
        submission: pack the ensemble's masks of the test images for the Decathlon's leaderboard.
        minutes: rough minutes of the training and evaluation of a fold.
        source: path of the file; not an entry of it.
    """

    what: ClassVar[str] = "a cross-validation"

    name: Name
    task: str | None = None
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_all_different)] | None = None
    data: str | None = None
    folds: Annotated[int, Field(ge=2)] = 5
    seed: Seed = 0
    arms: Annotated[dict[Name, FoldArm], Field(min_length=1)] = {"scratch": FoldArm()}
    pretraining: OwnPretraining | None = None
    training: Options = {}
    training_of: dict[str, Options] = {}
    evaluation: Options = {}
    ensemble: Annotated[list[str], AfterValidator(_all_different)] = []
    scans: str | None = None
    inference: Options = {}
    submission: bool = False
    minutes: Minutes = 240.0
    preset: Literal["official", "few_label", "whole_network", "cpu"] = "official"
    source: str = ""


def read_folds(path: Path) -> Folds:
    """Read the file of a cross-validation.

    Raises:
        InputError: it does not exist, is not YAML, or has wrong entries; names each with its value and what is allowed.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist. Pass a YAML file such as workflow/examples/cross_validation.yaml.")
    return check_folds(read_entries(path, example="name: spleen"), source=str(path))


def check_folds(content: Mapping[str, Any], *, source: str) -> Folds:
    """Build a cross-validation from the entries of a file.

    Args:
        content: the entries.
        source: path of the file.

    Raises:
        InputError: see `read_folds`.
    """
    return build(Folds, content, source, _problems)


def _problems(folds: Folds) -> Iterator[str]:
    """Yield what is wrong with the entries together."""
    scans = folds.pretraining.scans if folds.pretraining else []
    named = {
        "scans": [folds.scans] if folds.scans else [],
        "pretraining.scans": [scans] if isinstance(scans, str) else scans,
    }
    for entry, paths in named.items():
        for path in paths:
            if not Path(path).expanduser().exists():
                yield f"{entry} {path} does not exist. Correct the path"
    if folds.task is not None and folds.tasks is not None:
        yield "has both task and tasks. Keep one of them"
    for name, arm in folds.arms.items():
        if arm.encoder == PRETRAINING and folds.pretraining is None:
            yield f"arms.{name}.encoder is {PRETRAINING}, but there is no entry pretraining. Add it, or name an encoder.pt"
        if arm.encoder not in (None, PRETRAINING) and not Path(arm.encoder).expanduser().is_file():
            yield f"arms.{name}.encoder {arm.encoder} does not exist. Correct the path, or say {PRETRAINING}"
    for arm in folds.ensemble:
        if arm not in folds.arms:
            yield f"ensemble {arm!r} is not an arm. Allowed are {', '.join(folds.arms)}"
    if folds.submission and not folds.ensemble:
        yield "submission needs an ensemble. Say of which arms: 'ensemble: [ARM]'"
    if folds.submission and folds.scans is not None:
        yield "submission segments the test images of each task. Remove scans"
    if folds.submission and folds.task == OWN:
        yield "submission is for tasks of the Decathlon. Remove it"
