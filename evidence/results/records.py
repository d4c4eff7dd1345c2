# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What finished runs leave behind, ``runs/NAME/done.json``, and what a report needs of it, wherever it is read from."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.errors import InputError

from ..study.study_data import read_json
from .encoder_figures import figures_of

METRICS = ("dice", "nsd", "hd95")
DONE, OUTLINE = "done.json", "outline.json"


@dataclass(frozen=True, eq=False)
class Result:
    """A scored fine-tuning.

    Attributes:
        name: of the run.
        facts: its arm, n, seed and so on (`plan.Run.facts`).
        scores: metric to an array (cases, labels) in the order of the outline, NaN where there is no score.
        seconds: of all its attempts.
    """

    name: str
    facts: Mapping[str, Any]
    scores: Mapping[str, np.ndarray]
    seconds: float


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Rows of an evaluation's ``scores.csv``; None where there is no score."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {"case": row["case"], "label": row["label"]}
        | {metric: float(row[metric]) if row[metric] else None for metric in METRICS}
        for row in rows
    ]


def table_of(
    rows: Iterable[Mapping[str, Any]],
    *,
    cases: Sequence[str],
    labels: Sequence[str],
    absent: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, np.ndarray]:
    """Scores by case and label.

    Args:
        rows: of ``scores.csv``.
        cases, labels: the order of the table.
        absent: see `leave_out_absent`.

    Raises:
        InputError: a row is of a case or label that is not among those asked for, or a case has no row.
    """
    table = {metric: np.full((len(cases), len(labels)), math.nan) for metric in METRICS}
    places = {case: place for place, case in enumerate(cases)}
    columns = {label: column for column, label in enumerate(labels)}
    seen = set()
    for row in rows:
        if row["case"] not in places or row["label"] not in columns:
            raise InputError(f"a score is of {row['case']}, {row['label']}, which is none of the study's: other data?")
        seen.add(row["case"])
        for metric in METRICS:
            if row[metric] is not None:
                table[metric][places[row["case"]], columns[row["label"]]] = row[metric]
    if missing := [case for case in cases if case not in seen]:
        raise InputError(f"{len(missing)} of {len(cases)} cases have no score, such as {missing[0]}.")
    return leave_out_absent(table, cases=cases, labels=labels, absent=absent or {})


def leave_out_absent(
    table: dict[str, np.ndarray], *, cases: Sequence[str], labels: Sequence[str], absent: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Take out the scores of labels that a case's own label file does not hold, of every run alike.

    An evaluation scores such a label 0 where the prediction has it and leaves it out where it has not, so that two runs would be compared on
    different patients.

    Args:
        table: metric to scores (cases, labels); changed in place.
        cases, labels: its order.
        absent: case to the labels that its file does not hold.
    """
    out = np.array([[label in absent.get(case, ()) for label in labels] for case in cases], dtype=bool)
    for scores in table.values():
        scores[out.reshape(scores.shape)] = math.nan
    return table


def read_done(folder: Path) -> dict[str, Any] | None:
    """``done.json`` of a run's folder, or None."""
    try:
        return read_json(folder / DONE, "the same command makes it again, of what has been trained")
    except FileNotFoundError:
        return None


def read_outline(out: Path) -> dict[str, Any]:
    """What the report of a study's folder is about.

    Raises:
        InputError: if no study was run there.
    """
    path = out / OUTLINE
    if not path.is_file():
        raise InputError(
            f"{out} holds no study: {path.name} is not there. Run one first: python -m evidence.run STUDY --out {out}"
        )
    return {
        "absent": {},
        **read_json(path, "the next run writes it again"),
    }  # studies of earlier versions do not say it


def read_results(out: Path) -> list[Result]:
    """The finished fine-tunings of a study's folder that the report may use; those of a search are not among them."""
    outline = read_outline(out)
    results = []
    for folder in sorted(path for path in (out / "runs").glob("finetune_*") if path.is_dir()):
        if done := read_done(folder):
            try:
                scores = table_of(
                    done["scores"], cases=outline["cases"], labels=outline["labels"], absent=outline["absent"]
                )
            except InputError as error:
                raise InputError(f"{folder / DONE}: {error}") from None
            results.append(Result(folder.name, done["settings"]["facts"], scores, done["seconds"]))
    return results


def read_figures(out: Path) -> dict[str, dict[str, float]]:
    """Name of each finished pre-training of a study's folder to its figures (`encoder_figures.figures_of`)."""
    found = {}
    for folder in sorted(path for path in (out / "runs").glob("pretrain_*") if path.is_dir()):
        if done := read_done(folder):
            found[folder.name] = figures_of_done(folder, done)
    return found


def figures_of_done(folder: Path, done: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a finished pre-training; runs of earlier versions have them in the files of their training alone."""
    return done["figures"] if "figures" in done else figures_of(folder, done["settings"])


def stacked(
    results: Sequence[Result], part: Mapping[str, Any], *, metric: str, n: int, arms: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Scores (seeds, cases, labels) of each arm at one n, and the seeds that it has finished.

    Args:
        results: finished runs, of other parts of the study, too.
        part: of the outline: ``seeds``, and whether each has an encoder of its own (``encoder_per_seed``).
        metric: one of `METRICS`.
        n: number of labelled patients.
        arms: their names.
    """
    found = {(r.facts["arm"], r.facts["n"], r.facts["seed"], r.facts["encoder_seed"]): r for r in results}

    def result_of(arm: str, seed: int) -> Result | None:
        own = seed if part["encoder_per_seed"] else part["seeds"][0]
        return found.get((arm, n, seed, own)) or found.get((arm, n, seed, None))

    done = {arm: [seed for seed in part["seeds"] if result_of(arm, seed)] for arm in arms}
    scores = {
        arm: np.stack([result_of(arm, seed).scores[metric] for seed in seeds]) for arm, seeds in done.items() if seeds
    }
    return scores, done
