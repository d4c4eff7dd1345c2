# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The headroom's table has floor, scratch, converged and ceiling, each of the right runs."""

from __future__ import annotations

import csv

import pytest

from evidence.report import write_report

from ..made_up_study import plan_of, planner, rescore, write_study

HEADROOM = {"n": [2, 4], "seeds": [0, 1], "convergence": {"seeds": [10], "gain": 0.005, "most": 400}}
LEVELS = {"floor": 0.2, "scratch": 0.4, "pretrained": 0.45, "converged": 0.5}
CHAIN = {
    50: 0.3,
    100: 0.35,
    200: 0.352,
    400: 0.9,
}  # beyond the end of the chain, 400 do not count. All of n = 2; n = 4 gains nothing from the beginning


def level(run, case, label):
    if run.name.startswith("converge_"):
        return CHAIN[run.facts["steps"]] if run.facts["n"] == 2 else 0.3
    return 0.7 if run.facts["n"] == 12 else LEVELS[run.facts["arm"]]


@pytest.fixture
def rows(tmp_path):
    """Rows of headroom.csv of a finished study, for the mean Dice, by n and arm."""
    made = planner(headroom=HEADROOM, steps=50, ablation=None)
    plan = plan_of(made, ["curve", "headroom"])
    write_study(tmp_path, plan, gain=0.0)
    rescore(tmp_path, plan, level)
    text = write_report(tmp_path)
    with open(tmp_path / "headroom.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if (row["label"], row["metric"]) == ("mean", "dice")]
    return {(int(row["n"]), row["arm"]): row for row in found}, text


def test_each_arm_has_its_own_runs(rows):
    found, _ = rows
    assert list(found) == [(n, arm) for n in (2, 4) for arm in ("floor", "scratch", "converged", "ceiling")]
    expected = {"floor": 0.2, "scratch": 0.4, "converged": 0.5, "ceiling": 0.7}
    for (n, arm), row in found.items():
        right = 0.4 if (n, arm) == (4, "converged") else expected[arm]  # 50 steps are enough with n = 4
        assert float(row["mean"]) == pytest.approx(right) and row["seeds"] == "2"
        if arm != "scratch":
            assert float(row["difference"]) == pytest.approx(right - 0.4)


def test_the_chain_is_told(rows):
    _, text = rows
    assert (
        "- n = 2: from scratch on the tuning patients: 50 steps 0.3000, 100 steps 0.3500, 200 steps 0.3520; "
        "twice 100 steps gain less than 0.005: 100 are enough." in text
    )
    assert "- n = 4: from scratch on the tuning patients: 50 steps 0.3000, 100 steps 0.3000; twice 50 steps" in text
    assert "| 2 | converged | 100 | 2 of 2 |" in text and "| 4 | converged | 50 | 2 of 2 |" in text
    assert "| 2 | ceiling (12 labelled) | 50 | 2 of 2 |" in text


def test_what_is_not_finished_stays_empty(tmp_path):
    made = planner(headroom=HEADROOM, steps=50, ablation=None)
    plan = plan_of(made, ["curve", "headroom"])
    write_study(tmp_path, plan, gain=0.0, unfinished=tuple(run.name for run in plan.runs))
    text = write_report(tmp_path)
    assert "| 2 | converged |  | 0 of 2 |" in text and "from scratch with more steps: not measured yet." in text


def test_converged_runs_of_other_steps_than_the_chosen_do_not_count(tmp_path):
    made = planner(headroom=HEADROOM, steps=50, ablation=None)
    plan = plan_of(made, ["curve", "headroom"])
    write_study(tmp_path, plan, gain=0.0)
    rescore(tmp_path, plan, level)
    changed = [run for run in plan.runs if run.name.startswith("converge_") and run.facts["steps"] in (50, 100)]
    rescore(tmp_path, type(plan)(plan.study, tuple(changed)), lambda *_: 0.3)
    assert "| 2 | converged | 50 | 2 of 2 | 0.4000" in write_report(tmp_path)
