# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find and read evaluations, and check that they fit into one table.

An evaluation is a folder written by ``evaluate.yaml``. Its ``summary.json`` (entry ``evaluated``) records the task, the
split and the weights that the model started from. Folder names are not interpreted.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.value_rules import check_choice
from ..common.words import counted
from ..segmentation.results.scores_table import read_scores

ARMS = ("pretrained", "scratch")
ARM_OF_START = {"encoder": "pretrained", "scratch": "scratch"}


@dataclass(frozen=True)
class Evaluation:
    """Results of one run of ``evaluate.yaml``.

    Attributes:
        folder: folder of the evaluation.
        task: name of the task.
        arm: one of `ARMS`.
        evaluated: entry ``evaluated`` of ``summary.json``.
        tolerance: NSD tolerance in mm by label, in the order of the labels.
        rows: rows of ``scores.csv``: ``case``, ``label`` and the `score_summary.METRICS`, NaN if there is no score.
    """

    folder: str
    task: str
    arm: str
    evaluated: dict[str, Any]
    tolerance: dict[str, float]
    rows: list[dict[str, Any]]
    not_scored: tuple[str, ...] = ()


def find_evaluations(evaluations: str | Sequence[str]) -> list[str]:
    """Return the folders of all evaluations, without duplicates.

    Args:
        evaluations: a folder, a pattern such as ``runs/*/evaluation``, or a list of both. A folder that is not an
            evaluation itself is searched for evaluations recursively.

    Raises:
        InputError: if one of them matches nothing or contains no evaluation.
    """
    names = [evaluations] if isinstance(evaluations, (str, os.PathLike)) else list(evaluations)
    found: dict[str, str] = {}
    for name in map(str, names):
        places = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        folders = [folder for place in places for folder in _evaluations_below(place)]
        if not folders:
            raise InputError(
                f"--evaluations {name!r}: found no folder with summary.json and scores.csv, as written by "
                "configs/evaluate.yaml. Check the path or pattern, or run configs/evaluate.yaml first."
            )
        for folder in folders:
            found.setdefault(os.path.realpath(folder), folder)
    if not found:
        raise InputError(f"--evaluations {evaluations!r} names no folder. Pass at least one.")
    return list(found.values())


def read_evaluation(folder: str, *, arm: str | None = None) -> Evaluation:
    """Read the results of one run of ``evaluate.yaml``.

    The arm is ``scratch`` if every model was trained from scratch, and ``pretrained`` if every model started from an
    encoder. It must be passed for other models: the file of a model that continued from a whole network does not record
    that network's origin, and weights from elsewhere may record nothing.

    Args:
        folder: folder of the evaluation.
        arm: one of `ARMS` if the models do not record it, else None.

    Raises:
        InputError: if the files are damaged, are from different runs or do not record the task (another bundle or an
            older version), or if the arm is unknown or contradicts the models.
    """
    try:
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        rows = read_scores(Path(folder) / "scores.csv")
        cases, tolerance = {row["case"] for row in rows}, summary["tolerance"]
        labels = {row["label"] for row in rows}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}: summary.json or scores.csv is damaged or was not written by configs/evaluate.yaml "
            f"({type(error).__name__}: {error}). Run configs/evaluate.yaml again."
        ) from error
    if cases != set(summary.get("cases", [])) or not labels <= tolerance.keys():
        raise InputError(
            f"{folder}: summary.json and scores.csv are from different runs: their cases or labels differ. "
            "Run configs/evaluate.yaml again."
        )
    evaluated = summary.get("evaluated") or {}
    if not {"task", "section", "split", "models"} <= evaluated.keys():
        raise InputError(
            f"{folder}/summary.json does not record task and model: it is from another bundle or an older version. Run "
            "configs/evaluate.yaml of this bundle again with the same options; cases with scores are not evaluated "
            "again."
        )
    arm, missing = _arm(folder, evaluated["models"], arm), tuple(map(str, summary.get("not_scored") or ()))
    return Evaluation(folder, evaluated["task"], arm, evaluated, tolerance, rows, missing)


def check_together(evaluations: Sequence[Evaluation]) -> None:
    """Check that the evaluations fit into one table.

    Raises:
        InputError: if two evaluations of the same task differ in labels, NSD tolerance or section of the data list, or
            if two evaluations of the same task and arm contain the same case.
    """
    first_of_task: dict[str, Evaluation] = {}
    owner: dict[tuple[str, str, str], Evaluation] = {}
    for one in evaluations:
        other = first_of_task.setdefault(one.task, one)
        for name, first, second in (
            ("labels or NSD tolerances", other.tolerance, one.tolerance),
            ("section", other.evaluated["section"], one.evaluated["section"]),
        ):
            if first != second:
                raise InputError(
                    f"{other.folder} and {one.folder} are both evaluations of {one.task}, but have different {name}: "
                    f"{first} and {second}. Remove one of them from --evaluations."
                )
        for case in sorted({row["case"] for row in one.rows}):
            other = owner.setdefault((one.task, one.arm, case), one)
            if other is not one:
                raise InputError(
                    f"{other.folder} and {one.folder} both contain the case {case} of {one.task}, {one.arm} (fold "
                    f"{fold_of(other)} and {fold_of(one)}), which would count twice. "
                    "Remove one of them from --evaluations."
                )


def doubts_of(evaluation: Evaluation) -> list[str]:
    """Return a warning about unscored cases, and for each model that may have been trained on scored ones."""
    missing = evaluation.not_scored
    doubts = (
        [
            f"{evaluation.folder}: {counted(len(missing), 'case was', 'cases were')} not scored, such as {missing[0]}, and "
            "the means leave them out. Fix what failed.csv names and evaluate again."
        ]
        if missing
        else []
    )
    if evaluation.evaluated["section"] == "test":
        return doubts
    reasons = {None: "does not record which cases its training held out", False: "held out other cases in its training"}
    return doubts + [
        f"{evaluation.folder}: {model['file']} {reasons[model['held_out']]}. It may have been trained on some of these "
        "cases, so the scores may be too high."
        for model in evaluation.evaluated["models"]
        if not model["held_out"]
    ]


def _evaluations_below(place: str) -> list[str]:
    if os.path.isfile(os.path.join(place, "summary.json")):
        return [place]
    return sorted(folder for folder, _, files in os.walk(place) if {"summary.json", "scores.csv"} <= set(files))


def _arm(folder: str, models: Sequence[Mapping[str, Any]], stated: str | None) -> str:
    """Return the arm of an evaluation: ``stated`` by the user, else recorded in the models."""
    if stated is not None:
        check_choice(name="arms", value=stated, choices=ARMS)
    starts = {model["file"]: model["start"] for model in models}
    recorded = {ARM_OF_START[start] for start in starts.values() if start in ARM_OF_START}
    details = "; ".join(f"{file} started from {start or 'unrecorded weights'}" for file, start in starts.items())
    if len(recorded) > 1:
        raise InputError(f"{folder} is from an ensemble of both arms: {details}. Remove it from --evaluations.")
    if stated is not None and recorded - {stated}:
        raise InputError(
            f"--arms states that {folder} is {stated}, but its model contradicts that: {details}. "
            "Remove it from --arms."
        )
    if stated is not None:
        return stated
    if recorded and all(start in ARM_OF_START for start in starts.values()):
        return recorded.pop()
    raise InputError(
        f"{folder}: cannot tell whether its model is pre-trained or from scratch: {details}. "
        f"Set it with --arms \"{{'{folder}': 'pretrained'}}\" or 'scratch'."
    )


def fold_of(evaluation: Evaluation) -> Any:
    """Return the held-out fold; None means the data list's own validation section or, without one, fold 0."""
    return evaluation.evaluated["split"]["fold"]
