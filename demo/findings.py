# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What the demo may claim: what pre-training learnt, how two trainings compare over patients, which organs were missed.

The figures come from the files of the runs, and each sentence follows from its figures. With a handful of patients the
interval is Student's t over patients: a bootstrap of so few is too narrow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import sem, t

from bundles.common.data.case_names import case_name
from bundles.common.words import counted, listed
from bundles.segmentation.results.scores_table import read_scores

LEVEL = 0.95
FOUND = 0.1  # Dice from which an organ counts as found: below it, mask and organ hardly touch

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """Paired difference in Dice between two trainings, over the same patients.

    Attributes:
        cases: the patients.
        first, second: mean Dice over organs of each patient, in both trainings.
        difference: mean over patients of first - second.
        interval: its 95% interval; None with fewer than two patients.
    """

    cases: tuple[str, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    difference: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Return ``higher`` or ``lower`` if the interval excludes zero, else ``open``."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "open"
        return "higher" if self.interval[0] > 0 else "lower"


def read_rows(out: Path, run: str) -> Rows:
    """Return the scores of a run's test patients, one row per patient and organ; see `scores_table.read_scores`."""
    return read_scores(out / run / "evaluation" / "scores.csv")


def interval_of_mean(values: ArrayLike, level: float = LEVEL) -> tuple[float, float] | None:
    """Return Student's t interval of the mean; None with fewer than two values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    half = float(t.ppf((1 + level) / 2, len(values) - 1) * sem(values))
    return float(values.mean()) - half, float(values.mean()) + half


def patient_means(rows: Rows, metric: str) -> dict[str, float]:
    """Return each patient's mean of a metric over the organs that have a score."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if not math.isnan(row[metric]):
            scores.setdefault(row["case"], []).append(row[metric])
    return {case: float(np.mean(values)) for case, values in scores.items()}


def compare(first: Rows, second: Rows) -> Comparison:
    """Compare the Dice of two trainings. Only organs that both have a score for count."""
    others = {(row["case"], row["label"]): row["dice"] for row in second}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in first:
        pair = row["dice"], others.get((row["case"], row["label"]), math.nan)
        if not any(map(math.isnan, pair)):
            pairs.setdefault(row["case"], []).append(pair)
    means = {case: np.mean(values, axis=0) for case, values in pairs.items()}
    differences = [float(a - b) for a, b in means.values()]
    return Comparison(
        cases=tuple(means),
        first=tuple(float(a) for a, _ in means.values()),
        second=tuple(float(b) for _, b in means.values()),
        difference=float(np.mean(differences)) if differences else math.nan,
        interval=interval_of_mean(differences),
    )


def start_sentence(found: Comparison) -> str:
    """Say whether the demo can distinguish the pre-trained start (first) from the random one (second)."""
    if found.interval is None:
        return (
            f"The demo cannot tell the pre-trained start from a random one: {patients(len(found.cases))} "
            "cannot give an interval."
        )
    figures = f"{signed(found.difference)} (95% interval {signed(found.interval[0])} to {signed(found.interval[1])})"
    if found.verdict == "open":
        return (
            f"The demo cannot tell the pre-trained start from a random one: over {patients(len(found.cases))} the mean "
            f"Dice differs by {figures}, and this interval spans zero."
        )
    return (
        f"On these {patients(len(found.cases))} the pre-trained start scored {found.verdict} than a random one: the "
        f"mean Dice differs by {figures}. Each start was trained once, so another seed may give another difference."
    )


def control_sentence(found: Comparison) -> str:
    """Say whether true labels (first) beat label maps of other patients (second)."""
    if found.interval is None:
        return f"{patients(len(found.cases)).capitalize()} cannot show whether labels that fit their scans matter."
    figures = f"{signed(found.difference)} mean Dice (95% interval {signed(found.interval[0])} to {signed(found.interval[1])})"
    if found.verdict == "higher":
        return f"Labels that fit their scans matter: against label maps of other patients they gain {figures}."
    return (
        f"The control failed: true labels gain {figures} against label maps of other patients. The networks have not "
        "learnt from the scans; train longer."
    )


def not_learnt(validation: Mapping[str, Any]) -> list[str]:
    """Return the proxy tasks that pre-training did not learn, by ``verdicts`` in its ``validation.json``."""
    return [task for task, verdict in validation["verdicts"].items() if not verdict["learnt"]]


def learnt_sentence(validation: Mapping[str, Any]) -> str:
    """Say what pre-training learnt, by ``validation.json``."""
    failed, tasks = not_learnt(validation), list(validation["verdicts"])
    if not failed:
        return f"Pre-training learnt all of its tasks: {listed(tasks)}."
    if len(failed) == len(tasks):
        return f"Pre-training learnt nothing: none of its tasks ({listed(tasks)}) is better than without learning."
    learnt = [task for task in tasks if task not in failed]
    return f"Pre-training did not learn {listed(failed)}. It learnt {listed(learnt)}."


def read_validation(out: Path) -> dict[str, Any]:
    """Return ``validation.json`` of the pre-training."""
    return json.loads((out / "swin_unetr_pretrain" / "validation.json").read_text())


def organs_of_patients(out: Path, labelled: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return the organs in the reference of each test patient.

    Args:
        out: the demo's folder.
        labelled: its data list of labelled scans.
    """
    present = {}
    for case in labelled["test"]:
        values = np.unique(np.asanyarray(nib.load(out / "data/labelled" / case["label"]).dataobj))
        present[case_name(case["image"])] = {labelled["labels"][str(int(value))] for value in values if value}
    return present


def missed_organs(rows: Rows, present: Mapping[str, Iterable[str]]) -> dict[str, tuple[int, int]]:
    """Return the organs not found in some patients: in how many, and how many have the organ.

    Args:
        rows: scores, of `read_rows`.
        present: organs in the reference of each patient, of `organs_of_patients`.
    """
    missed: dict[str, tuple[int, int]] = {}
    for organ in dict.fromkeys(row["label"] for row in rows):
        dice = [row["dice"] for row in rows if row["label"] == organ and organ in present[row["case"]]]
        if number := sum(value < FOUND for value in dice):
            missed[organ] = number, len(dice)
    return missed


def missed_sentences(missed: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a line for each missed organ, such as ``esophagus: not found in 2 of 5 patients``."""
    return [
        f"{organ.replace('_', ' ')}: not found in {number} of {patients(total)}"
        for organ, (number, total) in missed.items()
    ]


def patients(number: int) -> str:
    """Return ``1 patient``, ``5 patients``."""
    return counted(number, "patient")


def signed(value: float) -> str:
    """Return a difference with its sign and three digits."""
    return f"{value:+.3f}".replace("-", "−")
