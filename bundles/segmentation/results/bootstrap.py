# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Confidence intervals of mean scores over few cases: percentile bootstrap, resampling cases with all their organs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 2000
LEVEL = 0.95


def mean_interval(
    scores: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float] | None:
    """Return the bootstrap interval of the mean of scores over cases.

    Each draw resamples the cases with replacement, as many as there are. The interval reaches from quantile
    ``(1 - level) / 2`` to ``(1 + level) / 2`` of the means of the draws (Efron's percentile interval). With several
    organs the score is the mean over organs of each organ's mean over cases. A case is drawn with all of its organs,
    because the scores of one patient's organs are correlated: drawing each organ separately would give too narrow an
    interval. An organ that no case of a draw has is skipped in that draw.

    With only a handful of cases the interval is too narrow, because a small sample underestimates the spread.

    Args:
        scores: shape (cases,) or (cases, organs); NaN where a case has no score.
        level: share of the draws inside the interval.
        draws: number of draws.
        seed: seed of the draws. Equal scores and seeds give equal intervals.

    Returns:
        The lower and the upper end; None if fewer than two cases have a score.
    """
    table = _table(scores)
    if len(table) < 2:
        return None
    cases = len(table)
    counts = np.random.default_rng(seed).multinomial(cases, np.full(cases, 1 / cases), size=draws)
    low, high = np.quantile(_means(table, counts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    a: ArrayLike, b: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Return the mean difference between the scores ``a`` and ``b`` of the same cases, and its bootstrap interval.

    The differences within cases are resampled. A case that is hard for both networks (pre-trained and from scratch)
    increases the spread of each one's scores, but not of their difference.

    Args:
        a: scores of shape (cases,) or (cases, organs).
        b: scores of the same cases and organs in the same order. Pairs with a NaN are skipped.
        level: see `mean_interval`.
        draws: see `mean_interval`.
        seed: see `mean_interval`.

    Returns:
        ``{"difference": mean of a - b, "interval": (low, high) or None, "n": number of cases that have a pair}``. The
        difference is NaN if no case has a pair. For HD95, where lower is better, a negative difference favours ``a``.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"a has the shape {a.shape}, b {b.shape}: they must be the scores of the same cases.")
    table = _table(a - b)
    return {
        "difference": float(_means(table, np.ones((1, len(table))))[0]) if len(table) else np.nan,
        "interval": mean_interval(table, level=level, draws=draws, seed=seed),
        "n": len(table),
    }


def _table(scores: ArrayLike) -> np.ndarray:
    """Return the scores as (cases, organs), without cases that have no score."""
    table = np.asarray(scores, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    return table[~np.isnan(table).all(axis=1)]


def _means(table: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean over organs of the means over cases, shape (draws,).

    ``table`` has the shape (cases, organs). ``counts``, shape (draws, cases), is how often each draw contains each
    case.
    """
    present = ~np.isnan(table)
    with np.errstate(invalid="ignore"):  # 0 / 0 if no drawn case has the organ
        of_organs = (counts @ np.where(present, table, 0.0)) / (counts @ present)
    return np.nanmean(of_organs, axis=1)
