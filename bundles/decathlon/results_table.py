# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compute the results table from the scores of cases: pre-trained and scratch for each task and label."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..segmentation.results.bootstrap import paired_interval
from ..segmentation.results.score_summary import METRICS, summarise
from .evaluations import ARMS, Evaluation

DIFFERENCES = ("dice", "nsd")
ALL_TASKS, MEAN = "all tasks", "mean"
PAPER = ("paper_pretrained_dice", "paper_scratch_dice", "paper_pretrained_nsd")
COLUMNS = (
    *("task", "label"),
    *(f"{arm}_{name}" for arm in ARMS for name in ("n", *METRICS, "hd95_missed")),
    *(f"difference_{metric}{end}" for metric in DIFFERENCES for end in ("", "_low", "_high")),
    "difference_n",
    *PAPER,
)


def results_table(
    evaluations: Sequence[Evaluation],
    *,
    labels: Mapping[str, Sequence[str]],
    published: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Build the table: one row per task and label, one per task's mean over labels, and one for the mean over tasks.

    Folds are pooled: a mean is over all cases of a task and arm, each counted once, not over the means of folds. The
    difference is over the cases that both arms scored, with the percentile bootstrap interval over cases
    (`bootstrap.paired_interval`). It can therefore deviate from the difference of the two means.

    Args:
        evaluations: evaluations that passed `check_together`.
        labels: maps each task to its label names; these always have rows. Tasks that are not listed come after them and
            do not count in the mean over tasks, so that it can be compared with the paper's.
        published: maps a task (or `ALL_TASKS`) to the scores of the paper, with keys of `PAPER`.

    Returns:
        Dictionaries with the keys `COLUMNS`; missing values are NaN. ``n`` counts cases, in the last row tasks. HD95
        (mm) is only present in the rows of labels.
    """
    pooled: dict[tuple[str, str], list[dict[str, Any]]] = {}
    known = {task: list(names) for task, names in labels.items()}
    for one in evaluations:
        pooled.setdefault((one.task, one.arm), []).extend(one.rows)
        known[one.task] = list(one.tolerance)
    table = []
    for task in [*sorted(labels), *sorted(known.keys() - labels.keys())]:
        rows = {arm: pooled[task, arm] for arm in ARMS if (task, arm) in pooled}
        table += _task_rows(task, known[task], rows, published.get(task, {}))
    counted = [row for row in table if row["task"] in labels] if labels else table
    return [*table, _mean_over_tasks(counted, published.get(ALL_TASKS, {}))]


def _row(task: str, label: str) -> dict[str, Any]:
    return {"task": task, "label": label, **dict.fromkeys(COLUMNS[2:], math.nan)}


def _task_rows(
    task: str, labels: Sequence[str], rows: Mapping[str, list[dict[str, Any]]], paper: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the row with the mean over labels, followed by the rows of the labels."""
    table = {label: _row(task, label) for label in labels}
    mean = _row(task, MEAN) | {name: float(paper[name]) for name in PAPER if name in paper}
    for arm, of_arm in rows.items():
        summary = summarise(of_arm, organs=labels)
        for label, moments in summary["labels"].items():
            table[label] |= {f"{arm}_{metric}": moments[metric]["mean"] for metric in METRICS}
            table[label] |= {f"{arm}_n": moments["dice"]["n"], f"{arm}_hd95_missed": moments["hd95"]["missed"]}
        mean |= {f"{arm}_{metric}": summary[f"mean_{metric}"] for metric in DIFFERENCES}
        mean[f"{arm}_n"] = len({row["case"] for row in of_arm})
    if len(rows) == len(ARMS):
        both = sorted(set.intersection(*({row["case"] for row in of_arm} for of_arm in rows.values())))
        for metric in DIFFERENCES:
            a, b = (_scores(rows[arm], both, labels, metric) for arm in ARMS)
            for column, label in enumerate(labels):
                table[label] |= _difference(metric, a[:, column], b[:, column])
            mean |= _difference(metric, a, b)
    return [mean, *table.values()]


def _scores(rows: Iterable[Mapping[str, Any]], cases: Sequence[str], labels: Sequence[str], metric: str) -> np.ndarray:
    """Return the scores, of shape (cases, labels)."""
    scores = {(row["case"], row["label"]): row[metric] for row in rows}
    return np.array([[scores.get((case, label), math.nan) for label in labels] for case in cases]).reshape(
        -1, len(labels)
    )


def _difference(metric: str, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    paired = paired_interval(a, b)
    low, high = paired["interval"] or (math.nan, math.nan)
    name = f"difference_{metric}"
    return {name: paired["difference"], f"{name}_low": low, f"{name}_high": high, "difference_n": paired["n"]}


def _mean_over_tasks(table: Sequence[Mapping[str, Any]], paper: Mapping[str, float]) -> dict[str, Any]:
    """Return the mean over the evaluated tasks, without an interval: ten chosen tasks are not a random sample."""
    tasks = [row for row in table if row["label"] == MEAN]
    last = _row(ALL_TASKS, MEAN) | {name: float(paper[name]) for name in PAPER if name in paper}
    for group in (*ARMS, "difference"):
        for metric in DIFFERENCES:
            values = [row[f"{group}_{metric}"] for row in tasks if not math.isnan(row[f"{group}_{metric}"])]
            if values:
                last |= {f"{group}_{metric}": float(np.mean(values)), f"{group}_n": len(values)}
    return last
