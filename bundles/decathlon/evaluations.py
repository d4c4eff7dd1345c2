# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The evaluations that lie in some folders: what each is of, and whether they fit into one table.

An evaluation is a folder that ``evaluate.yaml`` wrote. Which task and split it is of, and what its model started from,
stands in its ``summary.json`` (``evaluated``); nothing is read out of the names of folders.
"""

from __future__ import annotations

import csv
import glob
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.run.option_checks import check_choice
from ..segmentation.results.score_summary import METRICS

ARMS = ("pretrained", "scratch")
ARM_OF_START = {"encoder": "pretrained", "scratch": "scratch"}


@dataclass(frozen=True)
class Evaluation:
    """What one run of ``evaluate.yaml`` left.

    Attributes:
        folder: where it lies.
        task: name of the task.
        arm: one of `ARMS`.
        evaluated: ``evaluated`` of its ``summary.json``.
        tolerance: NSD tolerance in mm of each label, in the order of the labels.
        rows: ``scores.csv``: ``case``, ``label`` and the `METRICS`, NaN where there is no score.
    """

    folder: str
    task: str
    arm: str
    evaluated: dict[str, Any]
    tolerance: dict[str, float]
    rows: list[dict[str, Any]]


def find_evaluations(evaluations: str | Sequence[str]) -> list[str]:
    """The folders of evaluations, each once.

    Args:
        evaluations: a folder, a pattern such as ``runs/*/evaluation``, or a list of both. A folder that is no evaluation
            itself stands for all that lie below it.

    Raises:
        InputError: if one of them fits nothing, or there is no evaluation in it.
    """
    names = [evaluations] if isinstance(evaluations, (str, os.PathLike)) else list(evaluations)
    found: dict[str, str] = {}
    for name in map(str, names):
        places = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        folders = [folder for place in places for folder in _evaluations_below(place)]
        if not folders:
            raise InputError(
                f"--evaluations {name!r}: no folder there holds summary.json and scores.csv, as configs/evaluate.yaml writes them. "
                "Check the path or pattern, or evaluate first."
            )
        for folder in folders:
            found.setdefault(os.path.realpath(folder), folder)
    if not found:
        raise InputError(f"--evaluations {evaluations!r} names no folder.")
    return list(found.values())


def read_evaluation(folder: str, *, arm: str | None = None) -> Evaluation:
    """Read what one run of ``evaluate.yaml`` left.

    The arm is ``scratch`` where every model started from no weights, and ``pretrained`` where every model started from
    an encoder. A model that went on from a whole network has a history that its file does not tell, and weights from
    elsewhere may say nothing: then it has to be said.

    Args:
        folder: of the evaluation.
        arm: one of `ARMS`, where the models do not say it; else None.

    Raises:
        InputError: if the files are damaged or do not belong together, do not say the task (another bundle, an older
            version), the arm is unknown, or what is said contradicts the models.
    """
    try:
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        with open(Path(folder) / "scores.csv", newline="", encoding="utf-8") as file:
            rows = [
                row | {metric: float(row[metric] or math.nan) for metric in METRICS} for row in csv.DictReader(file)
            ]
        cases, tolerance = {row["case"] for row in rows}, summary["tolerance"]
        labels = {row["label"] for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}: summary.json or scores.csv is damaged or was not written by configs/evaluate.yaml ({type(error).__name__}: {error})."
        ) from error
    if cases != set(summary.get("cases", [])) or not labels <= tolerance.keys():
        raise InputError(
            f"{folder}: summary.json and scores.csv are of different runs: their cases or labels differ. Evaluate again."
        )
    evaluated = summary.get("evaluated") or {}
    if not {"task", "section", "split", "models"} <= evaluated.keys():
        raise InputError(
            f"{folder}/summary.json does not say its task and model: it is of another bundle or of an older version. Run configs/evaluate.yaml of "
            "this bundle again with the same options: what is scored already is not scored again."
        )
    return Evaluation(folder, evaluated["task"], _arm(folder, evaluated["models"], arm), evaluated, tolerance, rows)


def check_together(evaluations: Sequence[Evaluation]) -> None:
    """Refuse evaluations that do not fit into one table.

    Raises:
        InputError: if two of one task differ in labels, NSD tolerance or section of the data list, or two of one task and arm hold the same case.
    """
    first_of_task: dict[str, Evaluation] = {}
    owner: dict[tuple[str, str, str], Evaluation] = {}
    for one in evaluations:
        other = first_of_task.setdefault(one.task, one)
        for what, ours, theirs in (
            ("labels and NSD tolerances", one.tolerance, other.tolerance),
            ("section", one.evaluated["section"], other.evaluated["section"]),
        ):
            if ours != theirs:
                raise InputError(
                    f"{other.folder} and {one.folder} are both of {one.task}, with different {what}: {theirs} and {ours}. "
                    "Leave one of them out of --evaluations."
                )
        for case in sorted({row["case"] for row in one.rows}):
            other = owner.setdefault((one.task, one.arm, case), one)
            if other is not one:
                raise InputError(
                    f"{other.folder} and {one.folder} both hold the case {case} of {one.task}, {one.arm} (fold {fold_of(other)} and "
                    f"{fold_of(one)}): it would count twice. Leave one of them out of --evaluations."
                )


def doubts_of(evaluation: Evaluation) -> list[str]:
    """Why the scores of an evaluation may flatter: cases that a model may have been trained on, as far as its file tells."""
    if evaluation.evaluated["section"] == "test":
        return []
    says = {None: "does not say which cases its training held out", False: "held out other cases in its training"}
    return [
        f"{evaluation.folder}: {model['file']} {says[model['held_out']]}, so it may have been trained on some of these, and the scores flatter."
        for model in evaluation.evaluated["models"]
        if not model["held_out"]
    ]


def _evaluations_below(place: str) -> list[str]:
    if os.path.isfile(os.path.join(place, "summary.json")):
        return [place]
    return sorted(folder for folder, _, files in os.walk(place) if {"summary.json", "scores.csv"} <= set(files))


def _arm(folder: str, models: Sequence[Mapping[str, Any]], said: str | None) -> str:
    if said is not None:
        check_choice(name="arms", value=said, choices=ARMS)
    starts = {model["file"]: model["start"] for model in models}
    of_models = {ARM_OF_START[start] for start in starts.values() if start in ARM_OF_START}
    told = "; ".join(
        f"{file} started from {start or 'weights that it does not tell'}" for file, start in starts.items()
    )
    if len(of_models) > 1:
        raise InputError(f"{folder} is of an ensemble of both arms: {told}. Leave it out of --evaluations.")
    if said is not None and of_models - {said}:
        raise InputError(
            f"--arms says that {folder} is {said}, but its model says otherwise: {told}. Leave it out of --arms."
        )
    if said is not None:
        return said
    if of_models and all(start in ARM_OF_START for start in starts.values()):
        return of_models.pop()
    raise InputError(
        f"{folder}: is it pre-trained or from scratch? {told}. Say it: --arms \"{{'{folder}': 'pretrained'}}\" or 'scratch'."
    )


def fold_of(evaluation: Evaluation) -> Any:
    """The fold that was held out; None: the data list's own validation section, else fold 0."""
    return evaluation.evaluated["split"]["fold"]
