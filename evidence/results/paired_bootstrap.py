# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How much better one arm is than another on the same patients with the same seeds, and how far that can be trusted.

One figure of an arm is the mean over organs of each organ's mean over all its runs (seeds) and patients, as
``summary.json`` of an evaluation has it for one run. The difference is taken within pairs: the same patient, organ and
seed (the same labelled patients, crops and initial decoder), with and without the encoder.

The interval is a percentile bootstrap (Efron) with two levels that cross, for every run scores the same patients: each
draw takes as many seeds as there are, with replacement, and by itself as many patients as there are, with replacement,
each with all its organs; then the figure is computed of the drawn pairs. With one seed it is
`bundles.segmentation.results.bootstrap.paired_interval`, draw for draw. Resampling k seeds shows (k - 1)/k of their variance at best:
with three seeds the interval is too narrow where runs differ much, and says nothing of seeds where there is one. So the report gives the
difference of each seed, too, and says where there are few. Simulated without a gain (differences with a standard deviation of 0.02 between
seeds and 0.05 between the scores of 32 patients), the interval leaves 0 out in 44% of studies of one seed, 12% of three, 7% of five, 5% of ten
(3000 studies each; 5% would be right).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bundles.segmentation.results.bootstrap import DRAWS, LEVEL


@dataclass(frozen=True)
class PairedDifference:
    """What `paired_difference` finds.

    Attributes:
        difference: mean of a - b over pairs, mean over organs; NaN without a pair.
        interval: its lower and upper end; None with fewer than two patients.
        by_seed: the same difference of each seed alone.
        patients: number of patients with a pair.
        higher, lower, equal: number of patients whose own mean of a - b (over seeds and organs) is above, below or 0.
    """

    difference: float
    interval: tuple[float, float] | None
    by_seed: tuple[float, ...]
    patients: int
    higher: int
    lower: int
    equal: int


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> PairedDifference:
    """Compare two arms.

    Args:
        a, b: scores of shape (seeds, patients, organs), in the same order; a pair with a NaN is left out.
        level: share of the draws inside the interval.
        draws: number of draws.
        seed: of the draws.

    Raises:
        ValueError: if the shapes differ or are not of three axes.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"a has the shape {a.shape}, b {b.shape}: both must be (seeds, patients, organs).")
    pairs = a - b
    pairs = pairs[:, ~np.isnan(pairs).all(axis=(0, 2))]
    seeds, patients, _ = pairs.shape
    if not patients:
        return PairedDifference(np.nan, None, (np.nan,) * seeds, 0, 0, 0, 0)
    interval = None
    if patients > 1:
        generator = np.random.default_rng(seed)
        of_patients = generator.multinomial(patients, np.full(patients, 1 / patients), size=draws)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
        low, high = np.nanquantile(_figure(pairs, of_seeds, of_patients), [(1 - level) / 2, (1 + level) / 2])
        interval = (float(low), float(high))
    every = np.ones((1, patients))
    by_seed = [float(_figure(pairs[[i]], np.ones((1, 1)), every)[0]) for i in range(seeds)]
    own = np.nanmean(pairs, axis=(0, 2))
    return PairedDifference(
        difference=float(_figure(pairs, np.ones((1, seeds)), every)[0]),
        interval=interval,
        by_seed=tuple(by_seed),
        patients=patients,
        higher=int((own > 0).sum()),
        lower=int((own < 0).sum()),
        equal=int((own == 0).sum()),
    )


def figure_of(scores: ArrayLike) -> float:
    """The figure of an arm: mean over organs of each organ's mean over the scores (seeds, patients, organs) that are there."""
    scores = np.asarray(scores, dtype=float)
    return float(_figure(scores, np.ones((1, scores.shape[0])), np.ones((1, scores.shape[1])))[0])


def patient_means(scores: np.ndarray) -> np.ndarray:
    """Each patient's mean over the scores (seeds, patients, organs) that are there; patients without any are left out."""
    present = scores[:, ~np.isnan(scores).all(axis=(0, 2))]
    return np.nanmean(present, axis=(0, 2)) if present.size else np.array([])


def _figure(table: np.ndarray, of_seeds: np.ndarray, of_patients: np.ndarray) -> np.ndarray:
    """The figure of each draw (draws,); ``of_seeds`` (draws, seeds) and ``of_patients`` (draws, patients) count what was drawn."""
    present = ~np.isnan(table)
    values = np.where(present, table, 0.0)
    of_organs = []
    for organ in range(table.shape[2]):
        total = ((of_seeds @ values[:, :, organ]) * of_patients).sum(axis=1)
        number = ((of_seeds @ present[:, :, organ].astype(float)) * of_patients).sum(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 where no drawn pair has the organ
            of_organs.append(total / number)
    stacked = np.stack(of_organs)
    found = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        return np.where(found, stacked, 0.0).sum(axis=0) / found.sum(axis=0)
