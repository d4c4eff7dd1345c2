# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The power equals tables, simulations and closed forms; too few seeds give no number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import nct, norm, t, ttest_1samp

from evidence.results.power import (
    MOST_SEEDS,
    pooled_sd,
    power_of,
    sd_interval,
    seeds_needed,
    smallest_difference,
    t_interval,
)


@pytest.mark.parametrize(("number", "share"), [(3, 1.0), (5, 2.0), (10, 0.5)])
def test_power_is_that_of_simulated_studies(number, share):
    """Simulate with SciPy's own test; the standard error of 20,000 studies is at most 0.0035."""
    found = np.random.default_rng(1).normal(share * 0.03, 0.03, (20_000, number))
    rejected = (ttest_1samp(found, 0, axis=1).pvalue < 0.05).mean()
    assert power_of(share * 0.03, sd=0.03, number=number) == pytest.approx(rejected, abs=0.012)


def test_power_is_the_noncentral_t_on_both_sides():
    limit = t.ppf(0.975, 4)
    shift = 0.02 * math.sqrt(5) / 0.03
    expected = nct.sf(limit, 4, shift) + nct.cdf(-limit, 4, shift)
    assert power_of(0.02, sd=0.03, number=5) == pytest.approx(expected, rel=1e-9)
    assert power_of(-0.02, sd=0.03, number=5) == pytest.approx(expected, rel=1e-9)
    assert power_of(0.0, sd=0.03, number=5) == pytest.approx(0.05)


@pytest.mark.parametrize(("number", "effect"), [(6, 1.435), (10, 0.996), (34, 0.4945)])
def test_smallest_differences_are_those_of_published_tables(number, effect):
    """Paired t-test, two-sided 5%, power 80%: 34 pairs for an effect of 0.5 standard deviations (G*Power)."""
    assert smallest_difference(sd=1.0, number=number) == pytest.approx(effect, abs=0.01)
    assert power_of(smallest_difference(sd=1.0, number=number), sd=1.0, number=number) == pytest.approx(0.8)


def test_the_smallest_difference_grows_with_the_spread_and_falls_with_the_seeds():
    assert smallest_difference(sd=0.06, number=3) == pytest.approx(2 * smallest_difference(sd=0.03, number=3))
    many = smallest_difference(sd=1.0, number=10_000)  # the normal distribution
    assert many == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) / 100, rel=1e-3)
    falling = [smallest_difference(sd=1.0, number=number) for number in (2, 3, 4, 8, 30)]
    assert falling == sorted(falling, reverse=True) and falling[0] > 10


def test_the_seeds_needed_are_the_fewest_that_suffice():
    for difference in (0.01, 0.02, 0.05):
        number = seeds_needed(difference, sd=0.03)
        assert (
            smallest_difference(sd=0.03, number=number) <= difference < smallest_difference(sd=0.03, number=number - 1)
        )
    assert seeds_needed(0.5, sd=1.0) == 34
    assert seeds_needed(100.0, sd=1.0) == 2
    assert seeds_needed(1e-6, sd=1.0) == MOST_SEEDS


def test_without_a_spread_or_two_seeds_there_is_no_number():
    assert math.isnan(smallest_difference(sd=0.03, number=1)) and math.isnan(smallest_difference(sd=math.nan, number=5))
    assert smallest_difference(sd=0.0, number=3) == 0.0 and seeds_needed(0.01, sd=0.0) == 2
    sd, freedom = pooled_sd([[0.1], []])
    assert math.isnan(sd) and freedom == 0
    assert t_interval([0.1]) is None and t_interval([]) is None and t_interval([0.1, math.nan]) is None


def test_the_pooled_spread_is_within_the_arms():
    """The arms' own means, here 0 and 1, do not count."""
    sd, freedom = pooled_sd([[-0.1, 0.0, 0.1], [0.8, 1.0, 1.2], [5.0]])
    assert sd == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 2)) and freedom == 2
    unequal, freedom = pooled_sd([[-0.1, 0.0, 0.1], [0.9, 1.1]])
    assert unequal == pytest.approx(math.sqrt((0.02 + 0.02) / 3)) and freedom == 2


def test_the_interval_of_a_spread_holds_the_true_one_as_often_as_it_says():
    generator = np.random.default_rng(2)
    found = generator.normal(0, 0.03, (4000, 3)).std(axis=1, ddof=1)
    ends = np.array([sd_interval(sd, 2) for sd in found])
    assert ((ends[:, 0] < 0.03) & (ends[:, 1] > 0.03)).mean() == pytest.approx(0.95, abs=0.012)


def test_the_t_interval_is_scipys_and_has_its_coverage():
    values = [0.023, 0.008, 0.046]
    known = ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((known.low, known.high))
    assert t_interval(values) == pytest.approx((-0.0219, 0.0732), abs=1e-4)
    found = np.random.default_rng(3).normal(0.01, 0.02, (4000, 3))
    ends = np.array([t_interval(each) for each in found])
    assert ((ends[:, 0] < 0.01) & (ends[:, 1] > 0.01)).mean() == pytest.approx(0.95, abs=0.012)


def test_a_number_of_seeds_just_below_the_most_is_found():
    difference = smallest_difference(sd=1.0, number=9000) * (1 + 1e-9)
    assert seeds_needed(difference, sd=1.0) == 9000
