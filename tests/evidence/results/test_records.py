# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Scores come to the place of their case and label; those of absent organs do not count."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bundles.common.errors import InputError
from evidence.results.records import Result, read_figures, read_outline, read_results, stacked, table_of

CASES, LABELS = ["a", "b"], ["liver", "spleen"]


def row(case, label, dice, hd95=1.5):
    return {"case": case, "label": label, "dice": dice, "nsd": dice / 2, "hd95": hd95}


ROWS = [row("b", "spleen", 0.4), row("a", "spleen", 0.0, None), row("a", "liver", 0.8), row("b", "liver", 0.6)]


def test_each_score_is_in_its_place_and_none_is_not_a_number():
    table = table_of(ROWS, cases=CASES, labels=LABELS)
    assert table["dice"].tolist() == [[0.8, 0.0], [0.6, 0.4]] and table["nsd"].tolist() == [[0.4, 0.0], [0.3, 0.2]]
    assert math.isnan(table["hd95"][0, 1]) and table["hd95"][1].tolist() == [1.5, 1.5]


def test_an_organ_that_a_label_file_lacks_has_no_score_of_any_kind():
    table = table_of(ROWS, cases=CASES, labels=LABELS, absent={"a": ["spleen"]})
    for scores in table.values():
        assert np.isnan(scores).tolist() == [[False, True], [False, False]]


def test_scores_of_others_and_cases_without_any_are_refused():
    with pytest.raises(InputError, match="a score of c, liver, which is not in the study"):
        table_of([*ROWS, row("c", "liver", 0.1)], cases=CASES, labels=LABELS)
    with pytest.raises(InputError, match="a score of a, heart, which is not in the study"):
        table_of([*ROWS, row("a", "heart", 0.1)], cases=CASES, labels=LABELS)
    with pytest.raises(InputError, match="1 of 3 cases have no score, such as d"):
        table_of(ROWS, cases=[*CASES, "d"], labels=LABELS)


def result(arm, n, seed, encoder_seed, value):
    facts = {"arm": arm, "n": n, "seed": seed, "encoder_seed": encoder_seed}
    return Result("run", facts, {"dice": np.full((2, 2), value)}, 1.0)


@pytest.mark.parametrize(("per_seed", "expected"), [(True, [1.0, 4.0]), (False, [1.0, 3.0])])
def test_the_runs_of_a_part_are_those_of_its_encoders_in_the_order_of_its_seeds(per_seed, expected):
    results = [result("p", 5, 8, 8, 4.0), result("p", 5, 8, 7, 3.0), result("p", 5, 7, 7, 1.0)]
    results += [result("p", 9, 7, 7, 9.0), result("scratch", 5, 8, None, 2.0)]
    part = {"seeds": [7, 8, 9], "encoder_per_seed": per_seed}
    scores, done = stacked(results, part, metric="dice", n=5, arms=["p", "scratch", "none"])
    assert done == {"p": [7, 8], "scratch": [8], "none": []} and set(scores) == {"p", "scratch"}
    assert scores["p"][:, 0, 0].tolist() == expected and scores["scratch"].shape == (1, 2, 2)


def test_finished_runs_are_read_and_the_others_left_out(tmp_path):
    facts = {"arm": "p", "n": 5, "seed": 7, "encoder_seed": 7}
    files = {
        "outline.json": {"cases": CASES, "labels": LABELS, "absent": {"a": ["spleen"]}},
        "runs/finetune_one/done.json": {"scores": ROWS, "settings": {"facts": facts}, "seconds": 3.5},
        "runs/finetune_two/settings.json": {},
        "runs/pretrain_one/done.json": {"figures": {"reconstruction": 0.25}},
        "runs/pretrain_two/settings.json": {},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (found,) = read_results(tmp_path)
    assert (found.name, found.facts, found.seconds) == ("finetune_one", facts, 3.5)
    assert found.scores["dice"][1].tolist() == [0.6, 0.4] and np.isnan(found.scores["dice"][0, 1])
    assert read_figures(tmp_path) == {"pretrain_one": {"reconstruction": 0.25}}
    assert read_outline(tmp_path)["first_figure"] == LABELS
    with pytest.raises(InputError, match="contains no study: outline.json is missing"):
        read_outline(tmp_path / "runs")
