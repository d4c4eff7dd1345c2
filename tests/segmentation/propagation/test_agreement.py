# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Agreement of copies, plausible volumes, the decision per organ, and leaving out labelled scans: by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bundles.common.errors import InputError
from bundles.segmentation.propagation.agreement import (
    LeftOut,
    Limits,
    agreement,
    decide,
    dice_of_organs,
    expected_volumes,
    keep_only,
    relation,
)
from bundles.segmentation.propagation.fusion import IGNORE

LABELS = {1: "liver", 2: "spleen", 3: "gallbladder"}


def row(*values):
    return np.array(values, np.uint8).reshape(-1, 1, 1)


def test_dice_leaves_out_voxels_without_an_answer():
    dice = dice_of_organs(row(1, 1, 1, 2, 0, 2), row(1, 1, 0, IGNORE, 2, IGNORE), labels=LABELS)
    assert dice["liver"] == 2 * 2 / 5
    assert dice["spleen"] == 0  # two of its voxels meet no answer, one is missed
    assert math.isnan(dice["gallbladder"])
    for one, other in ((row(1, 1), row(1, IGNORE)), (row(1, IGNORE), row(1, 1))):
        assert dice_of_organs(one, other, labels=LABELS)["liver"] == 1


def test_agreement_is_the_mean_over_pairs_that_hold_the_organ():
    copies = [row(1, 1, 2, 3), row(1, 1, 2, 0), row(1, 0, 0, 0)]
    found = agreement(copies, labels=LABELS, holds=[{1, 2, 3}, {1, 2}, {1, 2}])
    assert found["liver"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert found["spleen"] == pytest.approx((1 + 0 + 0) / 3)
    assert math.isnan(found["gallbladder"])  # one scan holds it: there is nothing to agree
    assert found["mean"] == pytest.approx((7 / 9 + 1 / 3) / 2)
    assert math.isnan(agreement([row(1)], labels=LABELS, holds=[{1}])["mean"])
    # If the second scan holds gallbladder and does not put it there, the two disagree.
    assert agreement(copies[:2], labels=LABELS, holds=[{3}, {3}])["gallbladder"] == 0


def test_volumes_are_expected_in_the_size_of_the_scan():
    """A scan of half the length along x has half the volume: scale 2 leads from it to the labelled scan."""
    expected = expected_volumes(
        [{"liver": 1000.0, "spleen": 0.0}, {"liver": 1200.0, "gallbladder": 30.0}], [(2, 1, 1), (1, 1, 0.8)]
    )
    assert expected == {"liver": (500.0, pytest.approx(1500.0)), "gallbladder": (pytest.approx(37.5),) * 2}


def test_decisions_and_their_reasons():
    expected = {organ: (100.0, 200.0) for organ in ("liver", "spleen", "gallbladder", "aorta", "stomach", "pancreas")}
    agreements = {
        "liver": 0.8,
        "spleen": 0.55,
        "gallbladder": math.nan,
        "aorta": math.nan,
        "stomach": 0.9,
        "pancreas": 0.9,
        "colon": 0.9,
        "mean": 0.7,
    }
    decisions = decide(
        "scan7",
        agreements=agreements,
        confidences={"liver": 0.1, "gallbladder": 0.7, "aorta": 0.59},
        volumes={"liver": 51, "spleen": 150, "gallbladder": 399, "aorta": 150, "stomach": 401, "colon": 5},
        expected=expected,
        limits=Limits(min_agreement=0.6, min_confidence=0.6, volume_ratio=(0.5, 2.0)),
    )
    told = {decision.organ: (decision.kept, decision.reason) for decision in decisions}
    assert list(told) == [organ for organ in agreements if organ != "mean"]
    assert {organ for organ, (kept, _) in told.items() if kept} == {"liver", "gallbladder"}
    assert told["liver"][1] == "the copies agree by Dice 0.80, and 51.0 ml are between 50.0 and 400.0 ml"
    assert told["spleen"][1] == "the copies agree by Dice 0.55, below 0.60"
    assert "one copy only, with confidence 0.70" in told["gallbladder"][1]
    assert told["aorta"][1] == "one copy only, and its confidence is 0.59, below 0.60"
    assert told["stomach"][1].startswith("it has 401.0 ml, and 50.0 to 400.0 ml are plausible")
    assert told["pancreas"][1].startswith("no voxel of it is left")
    assert told["colon"][1] == "no labelled scan holds it"
    assert {decision.scan for decision in decisions} == {"scan7"}


def test_an_organ_that_is_not_kept_is_ignored_and_not_background():
    decisions = decide(
        "scan",
        agreements={"liver": 0.9, "spleen": 0.1},
        confidences={},
        volumes={"liver": 1, "spleen": 1},
        expected={"liver": (1, 1), "spleen": (1, 1)},
        limits=Limits(),
    )
    label = row(0, 1, 2, IGNORE)
    assert keep_only(label, decisions, labels=LABELS).ravel().tolist() == [0, 1, IGNORE, IGNORE]
    assert label.ravel().tolist() == [0, 1, 2, IGNORE]
    with pytest.raises(InputError, match=r"Label 3 \(gallbladder\)"):
        keep_only(row(3), decisions, labels=LABELS)


def test_the_relation_gives_the_agreement_that_a_dice_needs():
    rows = [LeftOut("a", "liver", a, d) for a, d in ((0.2, 0.1), (0.5, 0.6), (0.7, 0.5), (0.9, 0.9), (math.nan, 1.0))]
    found = relation(rows, dice=0.65)
    assert found.pairs == 4 and found.rank_correlation == pytest.approx(0.8)
    assert found.min_agreement == 0.5  # (0.6 + 0.5 + 0.9) / 3 = 0.667
    assert math.isnan(relation(rows, dice=0.95).min_agreement)
    assert math.isnan(relation(rows[:2], dice=0.5).rank_correlation)
    assert relation([], dice=0.5).pairs == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Limits(min_agreement=1.2), "--min_agreement 1.2 must be a number from 0 to 1"),
        (lambda: Limits(volume_ratio=(1.5, 2)), "volume_ratio"),
        (lambda: agreement([row(1)], labels=LABELS, holds=[]), "1 copies"),
        (lambda: agreement([], labels={1: "mean"}, holds=[]), "rename"),
        (lambda: dice_of_organs(row(1), row(1, 1), labels=LABELS), "must be equal"),
        (lambda: dice_of_organs(row(1), row(1), labels={0: "background"}), "from 1 to 254"),
        (lambda: expected_volumes([{"liver": 1}], [(1, 0, 1)]), "above 0"),
        (lambda: expected_volumes([{"liver": 1}], []), "1 labelled scans, but 0 scales"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()
