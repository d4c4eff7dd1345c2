# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Sentences of the demo claim no more than their figures."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy.stats import ttest_1samp

from demo.findings import (
    Comparison,
    compare,
    control_sentence,
    interval_of_mean,
    learnt_sentence,
    missed_organs,
    missed_sentences,
    organs_of_patients,
    patient_means,
    start_sentence,
)

NAN = float("nan")


def rows(table):
    """Rows of a table ``{case: {organ: dice}}``."""
    return [
        {"case": case, "label": organ, "dice": dice, "nsd": dice, "hd95": 1.0}
        for case, organs in table.items()
        for organ, dice in organs.items()
    ]


def found(low, high, difference=0.0):
    return Comparison(("a", "b", "c"), (0.5,) * 3, (0.5,) * 3, difference, (low, high))


def test_interval_is_that_of_students_t():
    values = [0.1, 0.4, 0.2, 0.25, 0.0]
    assert interval_of_mean(values) == pytest.approx(tuple(ttest_1samp(values, 0).confidence_interval(0.95)))
    assert interval_of_mean([1.0, 3.0], level=0.5) == pytest.approx((1, 3))  # t(1) is 1 at three quarters
    assert interval_of_mean([0.2, 0.2, 0.2]) == pytest.approx((0.2, 0.2))
    assert interval_of_mean([0.2]) is None and interval_of_mean([]) is None


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [interval_of_mean(rng.normal(0.3, 0.1, 5)) for _ in range(2000)]
    assert np.mean([low <= 0.3 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_patients_are_compared_with_themselves():
    first = rows({"a": {"liver": 0.9, "aorta": 0.7}, "b": {"liver": 0.5, "aorta": 0.3}})
    second = rows({"b": {"aorta": 0.1, "liver": 0.5}, "a": {"aorta": 0.5, "liver": 0.9}})
    result = compare(first, second)

    assert result.cases == ("a", "b")
    assert result.first == pytest.approx((0.8, 0.4)) and result.second == pytest.approx((0.7, 0.3))
    assert result.difference == pytest.approx(0.1) and result.interval == pytest.approx((0.1, 0.1))


def test_organ_without_a_score_in_one_training_counts_in_neither():
    first = rows({"a": {"liver": 0.9, "aorta": 0.0}, "b": {"liver": 0.8, "aorta": 0.6}})
    second = rows({"a": {"liver": 0.7, "aorta": NAN}, "b": {"liver": 0.7, "aorta": 0.6}})
    result = compare(first, second)
    assert result.first == pytest.approx((0.9, 0.7)) and result.second == pytest.approx((0.7, 0.65))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.1, 0.1, "open"), (0.0, 0.1, "open"), (-0.1, 0.0, "open"), (0.001, 0.1, "higher"), (-0.1, -0.001, "lower")],
)
def test_verdict_needs_an_interval_without_zero(low, high, verdict):
    assert found(low, high).verdict == verdict
    assert ("cannot tell" in start_sentence(found(low, high))) == (verdict == "open")


def test_start_sentences_hold_their_figures():
    assert start_sentence(found(-0.02, 0.06, 0.02)) == (
        "The demo cannot tell the pre-trained start from a random one: over 3 patients the mean Dice differs by +0.020 "
        "(95% interval −0.020 to +0.060), and this interval spans zero."
    )
    assert "scored lower than a random one: the mean Dice differs by −0.020 (95% interval −0.030 to −0.010)" in (
        start_sentence(found(-0.03, -0.01, -0.02))
    )


def test_one_patient_gives_no_claim():
    one = compare(rows({"a": {"liver": 0.9}}), rows({"a": {"liver": 0.1}}))
    assert one.difference == pytest.approx(0.8) and one.interval is None and one.verdict == "open"
    assert start_sentence(one).endswith("1 patient cannot give an interval.")
    assert control_sentence(one).startswith("1 patient cannot show")


@pytest.mark.parametrize(("low", "high", "matters"), [(0.4, 0.6, True), (-0.1, 0.6, False), (-0.6, -0.4, False)])
def test_control_fails_unless_true_labels_are_clearly_better(low, high, matters):
    sentence = control_sentence(found(low, high, (low + high) / 2))
    assert sentence.startswith("Labels that fit their scans matter") == matters
    assert sentence.startswith("The control failed") != matters


@pytest.mark.parametrize(
    ("learnt", "sentence"),
    [
        ((True, True), "Pre-training learnt all of its tasks: rotation and contrast."),
        ((True, False), "Pre-training did not learn contrast. It learnt rotation."),
        ((False, False), "Pre-training learnt nothing: none of its tasks (rotation and contrast) is better than"),
    ],
)
def test_what_was_learnt_follows_the_verdicts(learnt, sentence):
    verdicts = {task: {"learnt": value} for task, value in zip(("rotation", "contrast"), learnt, strict=True)}
    assert learnt_sentence({"verdicts": verdicts}).startswith(sentence)


def test_organ_is_missed_below_a_tenth_and_only_where_the_patient_has_it():
    table = {
        "a": {"esophagus": 0.0, "aorta": 0.1, "liver": 0.9},
        "b": {"esophagus": 0.099, "aorta": 0.0, "liver": 0.9},
        "c": {"esophagus": 0.5, "aorta": 0.8, "liver": NAN},
    }
    everything = {"esophagus", "aorta", "liver"}
    present = {"a": everything, "b": everything - {"aorta"}, "c": everything - {"liver"}}
    missed = missed_organs(rows(table), present)

    assert missed == {"esophagus": (2, 3)}
    assert missed_sentences(missed) == ["esophagus: not found in 2 of 3 patients"]
    assert missed_sentences({"left_kidney": (1, 1)}) == ["left kidney: not found in 1 of 1 patient"]


def test_organs_of_a_patient_are_those_of_its_label_map(tmp_path):
    folder = tmp_path / "data/labelled"
    folder.mkdir(parents=True)
    for name, values in {"one": (0, 2), "two": (1, 1)}.items():
        nib.save(nib.Nifti1Image(np.array(values, np.uint8).reshape(2, 1, 1), np.eye(4)), folder / f"{name}.nii.gz")
    labelled = {
        "labels": {"0": "background", "1": "liver", "2": "aorta"},
        "test": [{"image": f"./scan{i}.nii.gz", "label": f"./{name}.nii.gz"} for i, name in enumerate(("one", "two"))],
    }
    assert organs_of_patients(tmp_path, labelled) == {"scan0": {"aorta"}, "scan1": {"liver"}}


def test_patient_means_leave_out_missing_scores():
    table = rows({"a": {"liver": 0.9, "aorta": NAN}, "b": {"liver": 0.8, "aorta": 0.4}})
    assert patient_means(table, "dice") == pytest.approx({"a": 0.9, "b": 0.6})
