# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The interval equals that of all possible draws, covers the true mean as often as stated, and keeps patients whole."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from bundles.segmentation.results.bootstrap import mean_interval, paired_interval

NAN = np.nan


def all_draws(table: list) -> np.ndarray:
    """The mean over organs of the organs' means of each of the n^n draws of n cases, one by one."""
    means = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for an organ that no case of the draw has
        for draw in itertools.product(table, repeat=len(table)):
            means.append(np.nanmean(np.nanmean(np.array(draw, dtype=float).reshape(len(table), -1), axis=0)))
    return np.array(means)


@pytest.mark.parametrize("level", [0.95, 0.8, 0.5])
@pytest.mark.parametrize(
    "table",
    [
        [0.0, 1.0, 3.0],
        [0.91, 0.3, 0.88],
        [[0.0, 0.5], [1.0, 0.1], [3.0, 0.7]],
        [[0.0, 0.5], [1.0, NAN], [3.0, 0.7]],
        [[0.0, NAN], [1.0, NAN], [3.0, 0.7]],
    ],
)
def test_the_interval_of_three_cases_is_that_of_all_27_draws(table, level):
    exact = np.quantile(all_draws(table), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    assert mean_interval(table, level=level) == pytest.approx(tuple(exact))


def test_the_interval_of_five_cases_is_near_that_of_all_3125_draws():
    scores = [0.2, 0.71, 0.83, 0.9, 0.94]
    assert mean_interval(scores) == pytest.approx(np.quantile(all_draws(scores), [0.025, 0.975]), abs=0.015)


def test_of_three_cases_the_interval_is_their_range():
    """A draw of the worst case alone comes in 1 of 27, more often than 2.5%."""
    assert mean_interval([0.7, 0.2, 0.9]) == pytest.approx((0.2, 0.9))


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    inside = {0.95: 0, 0.5: 0}
    for _ in range(400):
        scores = rng.normal(loc=3.0, size=30)
        for level in inside:
            low, high = mean_interval(scores, level=level, draws=500)
            inside[level] += low <= 3.0 <= high
    assert 0.90 < inside[0.95] / 400 < 0.98
    assert 0.44 < inside[0.5] / 400 < 0.56


def test_its_width_is_that_of_the_standard_error():
    scores = np.random.default_rng(0).normal(size=200)
    low, high = mean_interval(scores, draws=20000)
    error = scores.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((scores.mean() - 1.96 * error, scores.mean() + 1.96 * error), abs=0.06 * error)


def test_organs_of_one_patient_stay_together():
    """Ten organs that fail together carry no more information than one; ten that fail independently have a tenth of the variance."""
    one = np.random.default_rng(1).normal(size=40)
    width = np.ptp(mean_interval(one))
    together = np.repeat(one[:, None], 10, axis=1)
    assert np.ptp(mean_interval(together)) == pytest.approx(width)
    apart = np.random.default_rng(2).permuted(together, axis=0)
    assert np.ptp(mean_interval(apart)) == pytest.approx(width / np.sqrt(10), rel=0.3)


def test_equal_seeds_give_equal_intervals():
    scores = np.random.default_rng(3).uniform(size=12)
    assert mean_interval(scores) == mean_interval(scores)
    assert mean_interval(scores, seed=1) != mean_interval(scores, seed=2)


def test_cases_without_a_score_are_left_out():
    assert mean_interval([0.7, NAN, 0.2, 0.9, NAN]) == mean_interval([0.7, 0.2, 0.9])
    assert mean_interval([[0.7, 0.1], [NAN, NAN], [0.2, NAN]]) == mean_interval([[0.7, 0.1], [0.2, NAN]])


@pytest.mark.parametrize("scores", [[], [0.5], [0.5, NAN], [[0.5, 0.7]], [[NAN, NAN], [0.5, 0.7]]])
def test_less_than_two_cases_have_no_interval(scores):
    assert mean_interval(scores) is None


def test_a_difference_within_the_cases_shows_although_the_cases_spread():
    scratch = np.random.default_rng(4).uniform(0.3, 0.9, size=15)
    pretrained = scratch + np.linspace(0.01, 0.03, 15)
    result = paired_interval(pretrained, scratch)
    assert result["difference"] == pytest.approx(0.02) and result["n"] == 15
    assert 0.01 < result["interval"][0] < 0.02 < result["interval"][1] < 0.03
    assert mean_interval(pretrained)[0] < mean_interval(scratch)[1]  # each one alone is not significant
    reverse = paired_interval(scratch, pretrained)
    assert reverse["difference"] == pytest.approx(-0.02)
    assert reverse["interval"] == pytest.approx((-result["interval"][1], -result["interval"][0]), abs=1e-3)


def test_pairs_without_both_scores_are_left_out():
    result = paired_interval([0.9, NAN, 0.6, 0.8], [0.8, 0.1, NAN, 0.5])
    assert result == {
        "difference": pytest.approx(0.2),
        "interval": pytest.approx(mean_interval([0.1, 0.3])),
        "n": 2,
    }


def test_a_difference_over_organs_is_the_mean_over_organs():
    a, b = [[0.9, 0.5], [0.7, NAN], [0.5, 0.4]], [[0.8, 0.1], [0.6, 0.9], [0.4, 0.2]]
    result = paired_interval(a, b)
    assert result["difference"] == pytest.approx((0.1 + 0.3) / 2)
    exact = np.quantile(all_draws((np.array(a) - b).tolist()), [0.025, 0.975], method="inverted_cdf")
    assert result["interval"] == pytest.approx(tuple(exact)) and result["n"] == 3


def test_one_pair_or_none_has_no_interval():
    assert paired_interval([0.9], [0.8]) == {"difference": pytest.approx(0.1), "interval": None, "n": 1}
    empty = paired_interval([NAN], [0.8])
    assert np.isnan(empty["difference"]) and empty["interval"] is None and empty["n"] == 0


def test_scores_of_other_cases_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\), b \(3,\)"):
        paired_interval([0.9, 0.8], [0.8, 0.7, 0.6])


def test_a_paired_interval_is_that_of_the_differences_with_all_its_options():
    a, b = np.random.default_rng(2).uniform(size=(2, 12))
    options = {"level": 0.6, "draws": 300, "seed": 5}
    found = paired_interval(a, b, **options)["interval"]
    assert found == mean_interval(a - b, **options)
    for name, value in {"level": 0.9, "draws": 400, "seed": 6}.items():
        assert paired_interval(a, b, **options | {name: value})["interval"] != found
