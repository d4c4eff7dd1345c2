# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Rows compare the same seeds, and spreads are those of a sample, against plain Python."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from bundles.segmentation.results.score_summary import METRICS
from evidence.results.records import Result
from evidence.results.table import FIRST, MEAN, lower_labels, row_of, rows_of

LABELS, CASES = ["liver", "spleen"], 4
OUTLINE = {"labels": LABELS, "first_figure": ["spleen"]}


def made_up(arm, seed):
    """Scores that differ for every arm, seed, case and label; the last case has no spleen by HD95."""
    scores = np.random.default_rng([len(arm), seed]).uniform(0.2, 0.9, (CASES, len(LABELS)))
    table = {metric: scores * (10 if metric == "hd95" else 1) for metric in METRICS}
    table["hd95"][-1, 1] = math.nan
    facts = {"arm": arm, "n": 5, "seed": seed, "encoder_seed": None if arm == "scratch" else 0}
    return Result(f"{arm}{seed}", facts, table, 1.0)


def rows_for(**seeds):
    results = [made_up(arm, seed) for arm, each in seeds.items() for seed in each]
    part = {"seeds": [0, 1, 2], "encoder_per_seed": False}
    return rows_of(OUTLINE, results, part, n=5, arms=["scratch", "pretrained"]), {
        (arm, seed): made_up(arm, seed).scores["dice"] for arm, each in seeds.items() for seed in each
    }


def test_only_seeds_that_both_arms_have_are_compared_each_with_itself():
    rows, dice = rows_for(scratch=[0, 1], pretrained=[1, 2])
    row = row_of(rows, 5, "pretrained", MEAN, "dice")
    expected = (dice["pretrained", 1] - dice["scratch", 1]).mean()
    assert row["by_seed"] == {1: pytest.approx(expected)} and row["difference"] == pytest.approx(expected)
    assert (row["pairs_of_seeds"], row["seeds"], row["seeds_planned"]) == (1, 2, 3)
    assert math.isnan(row["t_low"]) and row["low"] <= expected <= row["high"]


def test_each_seed_is_paired_whatever_the_order_of_the_results():
    rows, dice = rows_for(pretrained=[2, 0, 1], scratch=[1, 2, 0])
    for label, pick in ((MEAN, [0, 1]), (FIRST, [1]), ("liver", [0])):
        row = row_of(rows, 5, "pretrained", label, "dice")
        expected = {
            seed: (dice["pretrained", seed] - dice["scratch", seed])[:, pick].mean().item() for seed in (0, 1, 2)
        }
        assert row["by_seed"] == pytest.approx(expected)
        reach = 4.302653 * stdev(expected.values()) / 3**0.5  # of Student's t, 2 degrees of freedom
        middle = fmean(expected.values())
        assert (row["t_low"], row["t_high"]) == pytest.approx((middle - reach, middle + reach), rel=1e-5)


@pytest.mark.parametrize(("t_high", "doubted"), [(-0.01, False), (0.0, True), (0.01, True)])
def test_an_interval_that_ends_at_0_contains_it(t_high, doubted):
    rows, _ = rows_for(scratch=[0, 1, 2], pretrained=[0, 1, 2])
    row = {**row_of(rows, 5, "pretrained", "liver", "dice"), "low": -0.3, "high": -0.1, "t_low": -0.4, "t_high": t_high}
    assert ("(not by the t interval)" in lower_labels([row])) is doubted


def test_standard_deviations_are_those_of_a_sample():
    rows, dice = rows_for(scratch=[0, 1, 2], pretrained=[0, 1, 2])
    for arm in ("scratch", "pretrained"):
        row = row_of(rows, 5, arm, MEAN, "dice")
        of_seeds = [dice[arm, seed].mean().item() for seed in (0, 1, 2)]
        of_cases = [fmean(dice[arm, seed][case].mean() for seed in (0, 1, 2)) for case in range(CASES)]
        assert row["mean"] == pytest.approx(fmean(of_seeds)) and row["patients"] == CASES
        assert row["sd_seeds"] == pytest.approx(stdev(of_seeds))
        assert row["sd_patients"] == pytest.approx(stdev(of_cases))
    differences = [
        fmean((dice["pretrained", seed] - dice["scratch", seed])[case].mean() for seed in (0, 1, 2))
        for case in range(CASES)
    ]
    assert row["sd_differences"] == pytest.approx(stdev(differences))
    assert (row["higher"], row["lower"]) == (sum(d > 0 for d in differences), sum(d < 0 for d in differences))


def test_scores_that_only_the_distance_lacks_are_counted():
    rows, _ = rows_for(scratch=[0, 1], pretrained=[0])
    found = {label: row_of(rows, 5, "scratch", label, "hd95")["missed"] for label in (MEAN, FIRST, *LABELS)}
    assert found == {MEAN: 2, FIRST: 2, "liver": 0, "spleen": 2}
    assert row_of(rows, 5, "scratch", MEAN, "dice")["missed"] == 0
    single = row_of(rows, 5, "pretrained", MEAN, "hd95")
    assert single["missed"] == 1 and math.isnan(single["sd_seeds"]) and single["pairs_of_seeds"] == 1
