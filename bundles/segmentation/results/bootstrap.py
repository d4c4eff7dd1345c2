# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How far a mean over few cases can be trusted: percentile bootstrap, the organs of one patient kept together."""

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

    Cases are drawn anew with replacement, as many as there are, and the interval reaches from quantile
    ``(1 - level) / 2`` to ``(1 + level) / 2`` of the means of the draws (Efron's percentile interval). With several
    organs the score is the mean over organs of each organ's mean over cases. A case is drawn with all of its organs:
    organs of one patient succeed and fail together, and to draw each by itself would give too narrow an interval. An
    organ that no case of a draw has is left out of that draw.

    Of a handful of cases the interval is too narrow, as a sample holds less spread than what it was drawn from.

    Args:
        scores: of shape (cases,) or (cases, organs); NaN where a case has no score, to be left out.
        level: the share of the draws inside the interval.
        draws: number of draws.
        seed: of the draws; equal scores with an equal seed have an equal interval.

    Returns:
        The lower and the upper end; None with fewer than two cases that have a score.
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
    """Return how much higher the scores ``a`` are than ``b`` of the same cases, and the interval of the difference.

    The differences within cases are drawn: that a case is hard for both networks, the pre-trained and the scratch one,
    spreads the scores of each, but not their difference.

    Args:
        a: scores of shape (cases,) or (cases, organs).
        b: scores of the same cases and organs in the same order. A pair with a NaN is left out.
        level: see `mean_interval`, as for ``draws`` and ``seed``.
        draws: number of draws.
        seed: of the draws.

    Returns:
        ``{"difference": mean of a - b, "interval": (low, high) or None, "n": number of cases that have a pair}``. The
        difference is NaN without any. Of HD95, where less is better, a negative difference speaks for ``a``.

    Raises:
        ValueError: if the shapes differ.
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
    """Return the scores as (cases, organs), without the cases that have none."""
    table = np.asarray(scores, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    return table[~np.isnan(table).all(axis=1)]


def _means(table: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean over organs of the means over cases, with each case as often as the draw has it.

    ``table`` is of shape (cases, organs), ``counts`` (draws, cases), the means (draws,).
    """
    present = ~np.isnan(table)
    with np.errstate(invalid="ignore"):  # 0 / 0 where no drawn case has the organ
        of_organs = (counts @ np.where(present, table, 0.0)) / (counts @ present)
    return np.nanmean(of_organs, axis=1)
