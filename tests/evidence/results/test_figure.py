# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The figures show the values of the tables: means, differences, intervals, and each patient."""

from __future__ import annotations

import numpy as np
import pytest

from evidence.results.figure import ablation_figure, curve_figure
from evidence.results.records import read_outline, read_results
from evidence.results.table import ablation_rows, curve_rows

from ..made_up_study import made_up_scores, whole_plan, write_study

SUBSETS = ["scratch", "inpainting", "contrast", "rotation"]
SUBSETS += ["inpainting\ncontrast", "inpainting\nrotation", "contrast\nrotation", "inpainting\ncontrast\nrotation"]


@pytest.fixture(params=["curve", "ablation"])
def drawn(request, tmp_path):
    """Kind, panels and rows of a study in which one arm is not finished, and its plan."""
    plan = whole_plan()
    left = [run.name for run in plan.runs if run.facts["arm"] == "rotation" or run.facts.get("n") == 4]
    write_study(tmp_path, plan, gain=0.05, unfinished=tuple(left))
    outline, results = read_outline(tmp_path), read_results(tmp_path)
    draw, rows_of, arms = {
        "curve": (curve_figure, curve_rows, outline["arms"]),
        "ablation": (ablation_figure, ablation_rows, [row["arm"] for row in outline["ablation"]["rows"]]),
    }[request.param]
    rows = rows_of(outline, results)
    means = {row["arm"]: row for row in rows if (row["n"], row["label"], row["metric"]) == (2, "mean", "dice")}
    assert list(means) == arms
    return request.param, draw(outline, results, rows).axes, means, plan


def first_points(lines):
    return {float(line.get_xdata()[0]): float(line.get_ydata()[0]) for line in lines if line.get_marker() == "o"}


def test_circles_are_the_means_and_the_differences(drawn):
    kind, (dice, difference), means, _ = drawn
    places = [-0.08, 0.08] if kind == "curve" else range(8)
    assert list(first_points(dice.lines)) == pytest.approx(list(places))
    assert list(first_points(dice.lines).values()) == pytest.approx(
        [row["mean"] for row in means.values()], nan_ok=True
    )
    against = [row["difference"] for arm, row in means.items() if arm != "scratch"]
    assert list(first_points(difference.lines)) == pytest.approx(list(places)[1:])
    assert list(first_points(difference.lines).values()) == pytest.approx(against, nan_ok=True)
    assert np.isnan(against).sum() == (1 if kind == "ablation" else 0)  # NaN: not finished
    assert [tick.get_text() for tick in dice.get_xticklabels()] == (["2", "4"] if kind == "curve" else SUBSETS)


def test_bars_are_the_intervals_and_lie_within_the_axis(drawn):
    _, (_, difference), means, _ = drawn
    bars = [tuple(line.get_ydata()) for line in difference.lines if line.get_linewidth() == 2]
    expected = [(row["low"], row["high"]) for row in means.values() if not np.isnan(row["low"])]
    assert bars == expected and len(bars) in (1, 6)
    low, high = difference.get_ylim()
    assert low == -high and all(low < end < high for bar in bars for end in bar) and high > 0.05


def test_dots_are_the_patients(drawn):
    kind, (dice, _), _, plan = drawn
    runs = [run for run in plan.runs if run.kind == "finetuning" and run.facts["n"] == 2 and not run.facts["encoder"]]
    runs = runs if kind == "curve" else [run for run in runs if run.facts["seed"] in (0, 1)]
    scores = [made_up_scores(run, gain=0.05) for run in runs]
    patients = list(dict.fromkeys(row["case"] for row in scores[0]))
    expected = [
        np.mean([row["dice"] for of_run in scores for row in of_run if row["case"] == case and row["dice"] is not None])
        for case in patients
    ]
    dots = next(line for line in dice.lines if line.get_marker() == ".")
    assert list(dots.get_ydata()) == pytest.approx(expected) and len(expected) == 20
