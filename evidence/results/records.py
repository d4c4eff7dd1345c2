# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Results of finished runs: read ``runs/NAME/done.json`` of a study's folder for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.errors import InputError
from bundles.segmentation.results.score_summary import METRICS
from tools.bundle_runs import DONE, read_json

from .encoder_figures import figures_of

OUTLINE = "outline.json"


@dataclass(frozen=True, eq=False)
class Result:
    """A scored fine-tuning.

    Attributes:
        name: name of the run.
        facts: its arm, n, seed and so on (`plan.Run.facts`).
        scores: metric to an array (cases, labels) in the order of the outline, NaN where there is no score.
        seconds: duration of all its attempts together.
    """

    name: str
    facts: Mapping[str, Any]
    scores: Mapping[str, np.ndarray]
    seconds: float


def table_of(
    rows: Iterable[Mapping[str, Any]],
    *,
    cases: Sequence[str],
    labels: Sequence[str],
    absent: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, np.ndarray]:
    """Arrange scores by case and label.

    Args:
        rows: ``scores`` of ``done.json``, None where there is no score.
        cases, labels: order of the rows and columns of the table.
        absent: case to labels that its label file does not contain. Their scores are set to NaN: an evaluation scores
            such a label 0 if the prediction contains it and not at all otherwise, so two runs would be compared on
            different patients.

    Returns:
        Metric to an array (cases, labels), NaN where there is no score.

    Raises:
        InputError: a row has an unknown case or label, or a case has no row.
    """
    table = {metric: np.full((len(cases), len(labels)), math.nan) for metric in METRICS}
    places = {case: place for place, case in enumerate(cases)}
    columns = {label: column for column, label in enumerate(labels)}
    seen = set()
    for row in rows:
        if row["case"] not in places or row["label"] not in columns:
            raise InputError(
                f"it has a score of {row['case']}, {row['label']}, which is not in the study. Were the data changed?"
            )
        seen.add(row["case"])
        if row["label"] in (absent or {}).get(row["case"], ()):
            continue
        for metric in METRICS:
            if row[metric] is not None:
                table[metric][places[row["case"]], columns[row["label"]]] = row[metric]
    if missing := [case for case in cases if case not in seen]:
        raise InputError(f"{len(missing)} of {len(cases)} cases have no score, such as {missing[0]}.")
    return table


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return ``done.json`` of a run's folder, or None if the run is not finished."""
    try:
        return read_json(folder / DONE, "the same command writes it again without training again")
    except FileNotFoundError:
        return None


def read_outline(out: Path) -> dict[str, Any]:
    """Return what the report of a study's folder covers (`plan.Planner.outline`).

    Raises:
        InputError: if no study was run there.
    """
    path = out / OUTLINE
    if not path.is_file():
        raise InputError(
            f"{out} contains no study: {path.name} is missing. Run one first: make few-label-curve STUDY=... OUT={out}"
        )
    outline = read_json(path, "the next run writes it again")
    # Outlines of earlier versions lack these entries.
    return {"absent": {}, "first_figure": outline["labels"], "headroom": None, "pretrainings": {}, **outline}


def read_results(out: Path) -> list[Result]:
    """Return the finished fine-tunings of a study's folder, without those of a search."""
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
    """Return the figures (`encoder_figures.figures_of`) of each finished pre-training of a study's folder, by name."""
    found = {}
    for folder in sorted(path for path in (out / "runs").glob("pretrain_*") if path.is_dir()):
        if done := read_done(folder):
            found[folder.name] = figures_of_done(folder, done)
    return found


def figures_of_done(folder: Path, done: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a finished pre-training. Earlier versions did not copy them from the training's files."""
    return done["figures"] if "figures" in done else figures_of(folder, done["settings"])


def stacked(
    results: Sequence[Result], part: Mapping[str, Any], *, metric: str, n: int, arms: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Stack the scores of each arm at one n.

    Args:
        results: finished runs; may include those of other parts of the study.
        part: part of the outline, with ``seeds`` and ``encoder_per_seed``.
        metric: one of `METRICS`.
        n: number of labelled patients.
        arms: names of the arms.

    Returns:
        Scores (seeds, cases, labels) of each arm that has any, and the seeds that each arm has finished.
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
