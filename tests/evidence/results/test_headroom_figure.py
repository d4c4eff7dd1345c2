# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The figure shows the means of the headroom's table, and what each chain of doubled steps found."""

from __future__ import annotations

import math

import pytest

from evidence.results.convergence import Chain
from evidence.results.headroom_figure import headroom_figure
from evidence.results.headroom_table import headroom_rows
from evidence.results.records import read_outline, read_results

from ..made_up_study import plan_of, planner, rescore, write_study
from .test_headroom_table import HEADROOM, LEVELS, level

CHAINS = {2: Chain({50: 0.3, 100: 0.35, 200: 0.352}, None, 100, True), 4: Chain({50: 0.3}, 100, None, False)}


def drawn(folder, *, unfinished=(), chains=CHAINS, **headroom):
    plan = plan_of(planner(headroom={**HEADROOM, **headroom}, steps=50, ablation=None), ["curve", "headroom"])
    names = tuple(run.name for run in plan.runs if run.facts["arm"] in unfinished)
    write_study(folder, plan, gain=0.0, unfinished=names)
    rescore(folder, plan, level)
    outline, results = read_outline(folder), read_results(folder)
    return headroom_figure(outline, results, headroom_rows(outline, results, chains), chains).axes


def means_of(panel):
    return [float(line.get_ydata()[0]) for line in panel.lines if line.get_marker() == "o"]


def test_means_and_differences_of_each_arm(tmp_path):
    dice, difference, _ = drawn(tmp_path)
    assert [text.get_text() for text in dice.get_legend().get_texts()] == ["floor", "scratch", "converged", "ceiling"]
    # Nothing is known of more steps at n = 4: its chain has not ended.
    at_2 = [LEVELS["floor"], LEVELS["scratch"], LEVELS["converged"], 0.7]
    expected = [value for pair in zip(at_2, [0.2, 0.4, math.nan, 0.7], strict=True) for value in pair]
    assert means_of(dice) == pytest.approx(expected, nan_ok=True)
    against = [value - 0.4 for index, value in enumerate(expected) if index not in (2, 3)]
    assert means_of(difference) == pytest.approx(against, nan_ok=True)
    assert [tick.get_text() for tick in dice.get_xticklabels()] == ["2", "4"]


def test_chains_with_a_ring_around_the_steps_that_are_enough(tmp_path):
    _, _, steps = drawn(tmp_path)
    lines = {line.get_label(): line for line in steps.lines}
    assert list(lines["2 labelled"].get_xdata()) == [50, 100, 200]
    assert list(lines["2 labelled"].get_ydata()) == [0.3, 0.35, 0.352]
    assert list(lines["4 labelled"].get_xdata()) == [50]
    (ring,) = [line for line in steps.lines if line.get_fillstyle() == "none"]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (100, 0.35)
    assert [tick.get_text() for tick in steps.get_xticklabels()] == ["50", "100", "200"]


def test_a_study_with_many_n_shows_every_chain(tmp_path):
    chains = {n: Chain({50: 0.1 * n}, 100, None, False) for n in (1, 2, 3, 4, 5)}
    _, _, steps = drawn(tmp_path, chains=chains)
    assert [line.get_label() for line in steps.lines] == [f"{n} labelled" for n in chains]


def test_arms_that_are_not_measured_have_no_place(tmp_path):
    panels = drawn(tmp_path, unfinished=("floor",), chains={}, convergence=None, ceiling=False)
    assert len(panels) == 2
    assert means_of(panels[0])[2:] == pytest.approx([0.4, 0.4])
    assert all(math.isnan(value) for value in means_of(panels[0])[:2])  # the floor is not finished
