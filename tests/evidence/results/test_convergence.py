# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A chain of doubled steps ends where a doubling gains too little, and scores its first figure alone."""

from __future__ import annotations

import math

import pytest

from evidence.results.convergence import chain_of, first_figure_of

LIMITS = {"gain": 0.005, "most": 800}


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, (100, None, False)),
        ({100: 0.5}, (200, None, False)),
        ({100: 0.5, 200: 0.55}, (400, None, False)),
        ({100: 0.5, 200: 0.55, 400: 0.554}, (None, 200, True)),  # gains 0.004
        ({100: 0.5, 200: 0.49}, (None, 100, True)),  # loses
        ({100: 0.5, 200: 0.55, 400: 0.6, 800: 0.65}, (None, 800, False)),  # 1600 would be too many
        ({100: 0.5, 200: 0.502, 400: 0.6}, (None, 100, True)),  # what lies beyond the end does not count
    ],
)
def test_a_chain_ends_where_a_doubling_gains_less_than_the_limit(figures, expected):
    chain = chain_of(100, figures, **LIMITS)
    assert (chain.next, chain.chosen, chain.converged) == expected


def test_the_limit_itself_is_a_gain():
    assert chain_of(1, {1: 0.25, 2: 0.375}, gain=0.125, most=8).next == 4
    assert chain_of(1, {1: 0.25, 2: 0.375}, gain=0.126, most=8).chosen == 1


def test_the_limit_of_steps_is_tried_and_not_exceeded():
    assert chain_of(100, {100: 0.1}, gain=0.005, most=200).next == 200
    assert chain_of(100, {100: 0.1}, gain=0.005, most=199).next is None
    assert chain_of(100, {100: 0.1}, gain=0.005, most=199).chosen == 100


def test_the_figure_is_of_the_first_labels_without_those_that_a_label_file_lacks():
    def run(a, b, lottery):
        scores = {("one", "a"): a, ("two", "a"): 0.9, ("one", "b"): b, ("two", "b"): b}
        rows = [{"case": case, "label": label, "dice": dice} for (case, label), dice in scores.items()]
        rows += [{"case": case, "label": "lottery", "dice": lottery} for case in ("one", "two")]
        return {"scores": [row | {"nsd": None, "hd95": None} for row in rows]}

    figure = first_figure_of(
        [run(0.4, 0.2, 1.0), run(0.6, 0.4, 0.0)],
        cases=["one", "two"],
        labels=["a", "lottery", "b"],
        absent={"two": ["a"]},
        columns=[0, 2],
    )
    assert figure == pytest.approx((0.5 + 0.3) / 2) and not math.isnan(figure)
