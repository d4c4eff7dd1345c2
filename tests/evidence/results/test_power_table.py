# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The first table says whether a pre-training could be told from none, or why that is not known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evidence.report import write_report
from evidence.results.headroom_table import headroom_rows
from evidence.results.power import smallest_difference
from evidence.results.power_table import Size, size_of, size_text
from evidence.results.records import read_outline, read_results
from evidence.results.table import curve_rows

from ..made_up_study import plan_of, planner, rescore, whole_plan, write_study

GAINS = {0: 0.02, 1: 0.05, 2: 0.11}  # by seed


def size(**changes):
    known = {"n": 2, "seeds": 3, "headroom": 0.2, "sd": 0.03, "smallest": 0.098, "smallest_range": (0.05, 0.6)}
    return Size(**(known | {"by_patients": 0.02, "needed": (73, 20, 6)} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "3 seeds show a difference of 0.098 or more, which is 49% of the headroom of 0.200."),
        ({"headroom": 0.098}, "no pre-training can be told from none at this size"),
        ({"headroom": 0.05}, "but all labels instead of 2 change scratch by +0.050."),
        ({"headroom": -0.01}, "no pre-training can be told from none"),
        ({"headroom": math.nan}, "The headroom is not measured"),
        ({"seeds": 1, "smallest": math.nan, "needed": None}, "one seed has no spread"),
        ({"smallest": math.nan, "needed": None}, "unknown until two seeds of scratch and of another arm"),
    ],
)
def test_the_verdict_is_stated(changes, words):
    assert words in size_text(size(**changes))


def study(tmp_path, **changes):
    """A finished study whose arm gains `GAINS` of each seed, and whose ceiling gains 0.3."""
    headroom = {"n": [2, 4], "seeds": [0, 1, 2], "floor": True, "ceiling": True}
    made = planner(headroom=headroom, steps=50, **changes)
    plan = plan_of(made, ["curve", "headroom"])

    def gain(run, case, label):
        if run.facts["n"] == 12:
            return 0.3
        return GAINS[run.facts["seed"]] if run.facts["arm"] == "pretrained" else 0.0

    write_study(tmp_path, plan, gain=0.0)
    rescore(tmp_path, plan, lambda run, case, label: 0.3 + gain(run, case, label))
    return read_outline(tmp_path), read_results(tmp_path)


def test_the_numbers_are_those_of_the_differences_of_the_seeds(tmp_path):
    outline, results = study(tmp_path)
    found = size_of(outline, curve_rows(outline, results), headroom_rows(outline, results, {}), 2)
    sd = float(np.std([0.02, 0.05, 0.11], ddof=1))
    assert found.sd == pytest.approx(sd) and found.headroom == pytest.approx(0.3)
    assert found.smallest == pytest.approx(smallest_difference(sd=sd, number=3)) == pytest.approx(3.264 * sd, rel=1e-3)
    assert found.smallest_range[0] < found.smallest < found.smallest_range[1]
    assert found.by_patients == pytest.approx(0, abs=1e-9)  # all patients gain the same


def test_the_patients_set_a_limit_of_their_own(tmp_path):
    outline, _ = study(tmp_path)
    plan = plan_of(planner(steps=50, ablation=None), ["curve"])
    cases = sorted(outline["cases"])
    own = {case: (place % 2) / 10 for place, case in enumerate(cases)}
    rescore(tmp_path, plan, lambda run, case, label: 0.3 + (own[case] if run.facts["arm"] == "pretrained" else 0.0))
    rows = curve_rows(outline, read_results(tmp_path))
    found = size_of({**outline, "headroom": None}, rows, [], 4)
    sd = float(np.std([own[case] for case in cases], ddof=1))
    assert found.by_patients == pytest.approx(smallest_difference(sd=sd, number=20))
    assert found.sd == pytest.approx(0, abs=1e-9) and math.isnan(found.headroom)


def test_the_report_begins_with_it(tmp_path):
    study(tmp_path, ablation=None)
    text = write_report(tmp_path)
    assert text.startswith(
        "## made_up: what this study can show\n\n- n = 2: 3 seeds show a difference of 0.150 or more, "
    )
    assert "which is 50% of the headroom of 0.300." in text.splitlines()[2]
    assert "| 2 | 0.300 | 0.0458 | 0.150 (" in text and (tmp_path / "power.md").read_text() in text


def test_one_finished_seed_is_not_enough(tmp_path):
    plan = whole_plan()
    left = tuple(run.name for run in plan.runs if run.facts["seed"] in (1, 2))
    write_study(tmp_path, plan, gain=0.05, unfinished=left)
    lines = write_report(tmp_path).splitlines()
    assert lines[2:4] == [
        f"- n = {n}: unknown until two seeds of scratch and of another arm are finished." for n in (2, 4)
    ]


def test_a_study_of_one_seed_says_that_it_cannot(tmp_path):
    plan = plan_of(planner(curve={"n": [2], "seeds": [0]}, ablation=None), ["curve"])
    write_study(tmp_path, plan, gain=0.05)
    text = write_report(tmp_path)
    assert "- n = 2: one seed has no spread: this study cannot tell a pre-training from luck" in text
    assert "a hint of a gain, not shown" in text and "one seed has no t interval" in text
