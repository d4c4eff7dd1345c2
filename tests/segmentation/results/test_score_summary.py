# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import math

import pytest

from bundles.segmentation.results.bootstrap import mean_interval
from bundles.segmentation.results.score_summary import format_summary, summarise


def rows_from(dice: dict[str, list[float]], hd95: dict[str, list[float]] | None = None) -> list[dict]:
    """Rows of cases c0, c1, ... with the Dice of each organ, half of it as NSD."""
    hd95 = hd95 or dice
    return [
        {"case": f"c{case}", "label": organ, "dice": score, "nsd": score / 2, "hd95": hd95[organ][case]}
        for organ, scores in dice.items()
        for case, score in enumerate(scores)
    ]


def test_summary_of_each_organ_and_of_all():
    nan = math.nan
    rows = rows_from({"a": [0.9, 0.6, 0.0], "b": [0.5, nan, 0.7]}, {"a": [2.0, 4.0, nan], "b": [1.0, nan, 3.0]})
    summary = summarise(rows, organs=["a", "b", "c"])
    a, b, c = (summary["labels"][organ] for organ in "abc")
    assert a["dice"] == {
        "mean": pytest.approx(0.5),
        "std": pytest.approx(math.sqrt(0.14)),
        "median": 0.6,
        "n": 3,
        "interval": [
            pytest.approx(0.0),
            pytest.approx(0.9),
        ],  # with three cases, one draw in 27 consists of the worst only
    }
    assert a["nsd"]["mean"] == pytest.approx(0.25)
    assert (a["hd95"]["mean"], a["hd95"]["n"], a["hd95"]["missed"]) == (3.0, 2, 1)
    assert (b["hd95"]["mean"], b["hd95"]["n"], b["hd95"]["missed"]) == (2.0, 2, 0)
    assert c["dice"]["n"] == c["hd95"]["n"] == c["hd95"]["missed"] == 0 and math.isnan(c["dice"]["median"])
    assert c["dice"]["interval"] is None
    assert summary["mean_dice"] == pytest.approx((0.5 + 0.6) / 2)
    assert summary["mean_hd95"] == pytest.approx((3.0 + 2.0) / 2)
    table = [[0.9, 0.5], [0.6, nan], [0.0, 0.7]]
    assert summary["intervals"]["mean_dice"] == pytest.approx(mean_interval(table))
    assert set(summary["intervals"]) == {"mean_dice", "mean_nsd", "mean_hd95"}


def test_organs_of_one_patient_are_drawn_together():
    """Ten patients, good or bad in all organs: the interval of the mean over twenty organs is that of one organ."""
    dice = [0.9, 0.4] * 5
    one, twenty = (
        summarise(rows_from({f"organ {i}": dice for i in range(count)}), organs=[f"organ {i}" for i in range(count)])
        for count in (1, 20)
    )
    assert twenty["intervals"]["mean_dice"] == pytest.approx(one["labels"]["organ 0"]["dice"]["interval"])
    assert one["intervals"]["mean_dice"][1] - one["intervals"]["mean_dice"][0] > 0.2


def test_one_case_has_no_interval():
    summary = summarise(rows_from({"a": [0.9]}), organs=["a"])
    assert summary["labels"]["a"]["dice"]["interval"] is None
    assert summary["intervals"] == {"mean_dice": None, "mean_nsd": None, "mean_hd95": None}
    text = format_summary(summary | {"cases": ["c0"], "tolerance": {"a": 1.0}})
    assert text.splitlines()[2].split() == "a 0.9000 0.0000 1 - 0.4500 0.0000 1.00 0.90 0.00 0".split()


def test_the_table_says_what_became_of_absent_organs():
    summary = summarise(rows_from({"a": [0.9, 0.0]}, {"a": [2.0, math.nan]}), organs=["a"])
    lines = format_summary(summary | {"cases": ["c0", "c1"], "tolerance": {"a": 1.0}}).splitlines()
    assert "95% bootstrap interval" in lines[0]
    assert lines[1].split()[-3:] == ["HD95", "std", "missed"]
    assert lines[2].split()[-3:] == ["2.00", "0.00", "1"]
    assert lines[2].split()[4:6] == ["[0.0000,", "0.9000]"]
    assert "no HD95" in lines[-1] and "not counted in n" in lines[-2]
    assert max(map(len, lines)) <= 140
