# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compute what a study of this size can show: the smallest difference that its test would find, and the seeds that it
would take.

A study compares two arms by their paired differences d_1, ..., d_k, one for each seed: the mean over patients and labels
of an arm minus that of scratch. The two-sided paired t-test at `ALPHA` asks whether their mean is 0. Its statistic has
a t-distribution with k - 1 degrees of freedom if the true difference is 0, and a noncentral one with the noncentrality
delta sqrt(k) / sigma if it is delta, where sigma is the standard deviation of the differences (Cohen, Statistical Power
Analysis for the Behavioral Sciences, 2nd edition 1988, chapter 2). Its square has a noncentral F-distribution with 1 and
k - 1 degrees of freedom, which is what is computed: `scipy.stats.ncf` is exact where `scipy.stats.nct` returns NaN for
the tail of the other side. The power is the probability that the test then rejects. The smallest difference that a study shows is the delta for which the power
is `POWER`.

More seeds do not help against the choice of the scored patients, who are the same for all seeds. The same test over the
patients, with the standard deviation of their mean differences, states that limit. It contains what is left of the
seeds' variation after the mean over them, so it is rather too large.

The standard deviation of a few seeds is itself uncertain: the interval of its square is that of the chi-square
distribution. Over several arms, `pooled_sd` is the root of their mean variance. The arms share the runs from scratch,
so the degrees of freedom are counted as those of one arm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, ncf, t

from bundles.segmentation.results.bootstrap import LEVEL

ALPHA = 1 - LEVEL
POWER = 0.8
MOST_SEEDS = 10_000


def power_of(difference: float, *, sd: float, number: int) -> float:
    """Return the probability that the two-sided paired t-test at `ALPHA` finds a true difference.

    Args:
        difference: the true mean difference.
        sd: standard deviation of the single differences, above 0.
        number: how many differences there are, at least 2.
    """
    limit = t.ppf(1 - ALPHA / 2, number - 1)
    squared = number * (difference / sd) ** 2
    return float(ncf.sf(limit**2, 1, number - 1, squared)) if squared else ALPHA


def smallest_difference(*, sd: float, number: int) -> float:
    """Return the true difference that the test finds with the probability `POWER`; see `power_of`.

    NaN with fewer than two differences; 0 if they are all equal.
    """
    if number < 2 or math.isnan(sd):
        return math.nan
    if sd == 0:
        return 0.0
    # The noncentrality: 16.3 with two differences, and hence one degree of freedom; 2.8 with many.
    shift = brentq(lambda shift: power_of(shift, sd=math.sqrt(number), number=number) - POWER, 1e-3, 40.0, xtol=1e-9)
    return sd * shift / math.sqrt(number)


def seeds_needed(difference: float, *, sd: float) -> int:
    """Return the fewest seeds with which the test finds a true difference with the probability `POWER`.

    At most `MOST_SEEDS`, which then means that number or more.
    """
    low, high = 1, 2  # low is too few
    while high < MOST_SEEDS and smallest_difference(sd=sd, number=high) > difference:
        low, high = high, 2 * high
    if high >= MOST_SEEDS and smallest_difference(sd=sd, number=MOST_SEEDS) > difference:
        return MOST_SEEDS
    high = min(high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if smallest_difference(sd=sd, number=middle) <= difference else (middle, high)
    return high


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the root of the mean variance of several arms' differences, weighted by freedom, and one arm's freedom.

    Args:
        groups: the differences by seed of each arm; those of fewer than two seeds are ignored.

    Returns:
        The standard deviation, and the largest number of seeds minus one; NaN and 0 without two seeds.
    """
    groups = [np.asarray(group, dtype=float) for group in groups if len(group) > 1]
    if not groups:
        return math.nan, 0
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups)), max(len(group) for group in groups) - 1


def sd_interval(sd: float, freedom: int) -> tuple[float, float]:
    """Return the interval (`LEVEL`) of a standard deviation that was estimated with some degrees of freedom."""
    low, high = chi2.ppf([1 - ALPHA / 2, ALPHA / 2], freedom)
    return sd * math.sqrt(freedom / low), sd * math.sqrt(freedom / high)


def t_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval (`LEVEL`) of the mean of differences by the t-distribution; None with fewer than two.

    With few seeds it is honest where the bootstrap is too narrow (`paired_bootstrap`), if the differences of the seeds
    are about normal. It says nothing about other patients.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.isnan(values).any():
        return None
    reach = t.ppf(1 - ALPHA / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)
