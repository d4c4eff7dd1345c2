# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Scores of label maps equal a slow formula, and the table of an evaluation contains them."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import surface_distance as deepmind
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import compute_hausdorff_distance
from monai.transforms import AsDiscreted, Compose, Invertd, LoadImaged, Orientationd
from scipy import ndimage
from scipy.spatial.distance import cdist

from bundles.common.cases.failures import Failures
from bundles.common.errors import InputError
from bundles.segmentation.results.case_scores import CaseScores
from bundles.segmentation.results.metrics import score_case

SPACING = (0.8, 1.1, 3.0)


def slow_dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    both = sum(bool(p) and bool(t) for p, t in zip(prediction.flat, truth.flat, strict=True))
    return 2 * both / (np.count_nonzero(prediction) + np.count_nonzero(truth))


def surface_of(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face to the outside, the outside of the volume too."""
    inside = np.pad(mask, 1)
    six_neighbours = [np.roll(inside, shift, axis) for axis in range(3) for shift in (-1, 1)]
    return (inside & ~np.logical_and.reduce(six_neighbours))[1:-1, 1:-1, 1:-1]


def all_pairs(prediction: np.ndarray, truth: np.ndarray, spacing) -> np.ndarray:
    """Distances in mm of all surface voxels of the one to all of the other."""
    return cdist(*(np.argwhere(surface_of(mask)) * np.array(spacing) for mask in (prediction, truth)))


def slow_hd95(prediction: np.ndarray, truth: np.ndarray, spacing) -> float:
    pairs = all_pairs(prediction, truth, spacing)
    return max(np.percentile(pairs.min(axis=axis), 95) for axis in (0, 1))


def deepminds_surface_dice(prediction: np.ndarray, truth: np.ndarray, spacing, tolerance: float) -> float:
    """The surface-distance package, on the whole volume."""
    distances = deepmind.compute_surface_distances(truth, prediction, spacing)
    return deepmind.compute_surface_dice_at_tolerance(distances, tolerance)


def blobs(seed: int, shape=(26, 22, 14), classes: int = 3) -> np.ndarray:
    """Smooth random regions that fill the volume and touch all of its borders; 0 is the background."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(classes + 1, *shape)), (0, 2, 2, 2))
    return fields.argmax(axis=0).astype(np.uint8)


def cube(start, stop, shape=(20, 20, 20), value: int = 1) -> np.ndarray:
    array = np.zeros(shape, dtype=np.uint8)
    array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = value
    return array


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.5])
def test_scores_equal_slow_formulas_and_deepminds_nsd_on_blobs_that_touch_the_border(seed, tolerance):
    truth, prediction = blobs(seed), blobs(seed)
    # A prediction that is shifted, and noisy in one part.
    prediction = np.roll(prediction, 1, axis=seed % 3)
    prediction[:8] = blobs(seed + 100)[:8]
    labels = {1: "one", 2: "two", 3: "three"}
    scores = score_case(prediction, truth, labels=labels, spacing=SPACING, tolerance=tolerance)
    assert list(scores) == ["one", "two", "three"]
    for value, organ in labels.items():
        assert (truth == value)[0].any() or (truth == value)[-1].any()
        expected = deepminds_surface_dice(prediction == value, truth == value, SPACING, tolerance)
        assert scores[organ]["nsd"] == pytest.approx(expected, abs=1e-6)
        assert scores[organ]["hd95"] == pytest.approx(slow_hd95(prediction == value, truth == value, SPACING), abs=1e-4)
        assert scores[organ]["dice"] == pytest.approx(slow_dice(prediction == value, truth == value), abs=1e-6)
        assert 0 < scores[organ]["dice"] < 1


@pytest.mark.parametrize("start", [(0, 0, 0), (0, 6, 15), (15, 15, 15), (7, 7, 7)])
def test_the_crop_does_not_alter_the_surface(start):
    """The same masks in a volume that ends at them, and in one with air around."""
    stop = tuple(s + 5 for s in start)
    truth, prediction = cube(start, stop), cube(start, (stop[0], stop[1] - 1, stop[2] - 2))
    tight = score_case(prediction, truth, labels={1: "liver"}, spacing=SPACING, tolerance=1.0)["liver"]
    padded = score_case(np.pad(prediction, 9), np.pad(truth, 9), labels={1: "liver"}, spacing=SPACING, tolerance=1.0)
    assert tight == padded["liver"]
    assert tight["hd95"] == pytest.approx(slow_hd95(prediction > 0, truth > 0, SPACING), abs=1e-5)
    assert tight["nsd"] == pytest.approx(deepminds_surface_dice(prediction > 0, truth > 0, SPACING, 1.0), abs=1e-6)


def test_a_mask_that_fills_the_volume_has_its_surface_at_the_border():
    """Truth 4x4x4 all ones; the prediction lacks the voxel at one corner, which only the surface around it shows."""
    truth = np.ones((4, 4, 4), dtype=np.uint8)
    prediction = truth.copy()
    prediction[0, 0, 0] = 0
    scores = score_case(prediction, truth, labels={1: "a"}, spacing=(1, 1, 1), tolerance=0.5)["a"]
    around = [np.pad(mask > 0, 5) for mask in (prediction, truth)]
    assert scores["nsd"] == pytest.approx(deepminds_surface_dice(*around, (1, 1, 1), 0.5), abs=1e-6)
    assert 0.9 < scores["nsd"] < 1
    assert scores["dice"] == pytest.approx(2 * 63 / (63 + 64))


def test_hand_made_dice_and_tolerance_in_mm():
    """Two plates of one voxel, 2 apart along Z where voxels are 3 mm: 6 mm, wherever an element of the surface lies."""
    truth, prediction = cube((0, 0, 5), (20, 20, 6)), cube((0, 0, 7), (20, 20, 8))
    for tolerance, expected in [(2.9, 0.0), (6.01, 1.0)]:
        scores = score_case(prediction, truth, labels={1: "a"}, spacing=SPACING, tolerance=tolerance)["a"]
        assert (scores["dice"], scores["nsd"]) == (0.0, expected)
        assert scores["hd95"] == pytest.approx(6.0)


@pytest.mark.parametrize(("size", "expected"), [((1, 1), 0.0), ((4, 10), 45.0)])
def test_hd95_is_the_percentile_of_the_direction_that_is_worse(size, expected):
    """Truth: a plate of 400 voxels. Prediction: the plate and a spot 15 voxels of 3 mm off, of 1 voxel or of 40.

    The spot is 1 of 401 or 40 of 440 voxels of the prediction, below and above 5 percent. One percentile over both
    directions together would see neither, 40 of 840.
    """
    truth = cube((0, 0, 2), (20, 20, 3))
    prediction = truth + cube((0, 0, 17), (*size, 18))
    pairs = all_pairs(prediction > 0, truth > 0, SPACING)
    assert np.percentile(np.concatenate([pairs.min(axis=0), pairs.min(axis=1)]), 95) == 0.0
    for maps in [(prediction, truth), (truth, prediction)]:
        assert score_case(*maps, labels={1: "a"}, spacing=SPACING, tolerance=1.0)["a"]["hd95"] == expected


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random region, and one that is moved by two voxels and deformed."""
    fields = [
        ndimage.gaussian_filter(np.random.default_rng(s).normal(size=(36, 32, 20)), (4, 4, 2))
        for s in (seed, seed + 50)
    ]
    threshold = np.quantile(fields[0], 0.7)
    return np.roll(fields[0], 2, axis=0) + 0.4 * fields[1] > threshold, fields[0] > threshold


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING, (2.0, 0.7, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_nsd_is_deepminds_and_hd95_within_a_voxel_of_it(seed, spacing):
    """The surface elements of its HD95 lie at voxel corners: distances differ by up to a voxel's diagonal."""
    prediction, truth = random_pair(seed)
    scores = score_case(prediction, truth, labels={1: "a"}, spacing=spacing, tolerance=2.0)["a"]
    distances = deepmind.compute_surface_distances(truth, prediction, spacing)
    hd95 = deepmind.compute_robust_hausdorff(distances, 95)
    assert abs(scores["hd95"] - hd95) < np.linalg.norm(spacing) < hd95 + 0.8
    nsd = deepmind.compute_surface_dice_at_tolerance(distances, 2.0)
    assert scores["nsd"] == pytest.approx(nsd, abs=1e-6) and nsd < 0.95


@pytest.mark.parametrize("axis", range(3))
def test_surface_scores_of_parallel_plates_equal_those_of_deepmind(axis):
    """Plates of one voxel, seven apart: all distances between them are equal, wherever a surface element lies."""
    plates = []
    for place in (4, 11):
        start, stop = [1, 1, 1], [19, 19, 19]
        start[axis], stop[axis] = place, place + 1
        plates.append(cube(start, stop))
    apart = 7 * SPACING[axis]
    distances = deepmind.compute_surface_distances(*(plate > 0 for plate in plates), SPACING)
    for tolerance in (0.8 * apart, 1.001 * apart):
        scores = score_case(*plates, labels={1: "a"}, spacing=SPACING, tolerance=tolerance)["a"]
        assert scores["nsd"] == pytest.approx(
            deepmind.compute_surface_dice_at_tolerance(distances, tolerance), abs=1e-6
        )
        assert scores["hd95"] == pytest.approx(deepmind.compute_robust_hausdorff(distances, 95)) == pytest.approx(apart)


def test_hd95_is_what_monai_gives():
    prediction, truth = random_pair(0)
    pair = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    scores = score_case(prediction, truth, labels={1: "a"}, spacing=SPACING, tolerance=1.0)["a"]
    asked = {"percentile": 95, "include_background": True, "spacing": list(SPACING)}
    assert scores["hd95"] == pytest.approx(compute_hausdorff_distance(*pair, **asked).item())


def test_equal_masks_score_one_and_other_values_are_ignored():
    truth = cube((2, 3, 4), (9, 9, 9), value=4)
    prediction = truth + cube((15, 15, 15), (18, 18, 18), value=7)
    scores = score_case(prediction, truth, labels={4: "spleen"}, spacing=SPACING, tolerance=0)
    assert scores == {"spleen": {"dice": 1.0, "nsd": 1.0, "hd95": 0.0}}


def test_absent_in_both_is_nan_and_in_one_only_is_zero():
    truth = cube((2, 2, 2), (5, 5, 5), value=1)
    prediction = cube((2, 2, 2), (5, 5, 5), value=2)
    scores = score_case(
        prediction, truth, labels={1: "missed", 2: "invented", 3: "absent"}, spacing=SPACING, tolerance=1
    )
    for organ in ("missed", "invented"):
        assert scores[organ]["dice"] == scores[organ]["nsd"] == 0.0
        assert math.isnan(scores[organ]["hd95"])
    assert all(math.isnan(score) for score in scores["absent"].values())


def test_tolerance_may_differ_by_organ():
    truth = cube((5, 5, 5), (9, 9, 9), value=1) + cube((12, 12, 12), (16, 16, 16), value=2)
    prediction = np.roll(truth, 1, axis=2)
    scores = score_case(
        prediction, truth, labels={1: "a", 2: "b"}, spacing=SPACING, tolerance={"a": 3.0, "b": 0.5, "unused": 9}
    )
    assert scores["a"]["nsd"] == 1.0 and scores["b"]["nsd"] < 1.0
    assert scores["a"]["dice"] == scores["b"]["dice"] == 0.75


def test_organs_without_a_tolerance_take_that_of_the_others_and_unknown_ones_are_refused(tmp_path):
    labels = {1: "a", 2: "b"}
    assert CaseScores(labels, {"b": 3}, tmp_path).tolerance == {"a": 1.0, "b": 3.0}
    assert CaseScores(labels, {"b": 3, "otherwise": 2}, tmp_path).tolerance == {"a": 2.0, "b": 3.0}
    with pytest.raises(InputError, match="--nsd_tolerance names c; the organs are a, b"):
        CaseScores(labels, {"c": 3}, tmp_path)


@pytest.mark.parametrize(
    "convert", [torch.from_numpy, lambda a: torch.from_numpy(a).float(), lambda a: a.astype(np.int64)]
)
def test_tensors_and_whole_floats_score_as_integers_do(convert):
    prediction, truth = blobs(1), blobs(2)
    asked = {"labels": {1: "a", 3: "c"}, "spacing": SPACING, "tolerance": 1.0}
    assert score_case(convert(prediction), convert(truth), **asked) == score_case(prediction, truth, **asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prediction": np.zeros((4, 4, 5))}, r"\(4, 4, 5\), the truth \(4, 4, 4\)"),
        ({"prediction": np.zeros((1, 4, 4, 4))}, r"prediction has the shape \(1, 4, 4, 4\)"),
        ({"truth": np.full((4, 4, 4), 0.5)}, "truth is no label map.*0.5"),
        ({"truth": np.pad([[[1.5]]], ((0, 3), (0, 3), (0, 3)))}, "truth is no label map.*1.5"),
        ({"spacing": (1.0, 0.0, 1.0)}, r"spacing is \[1.0, 0.0, 1.0\]"),
        ({"tolerance": -1.0}, "liver.*-1.0"),
        ({"tolerance": {"liver": "far"}}, "liver.*far"),
        ({"labels": {0: "background", 1: "liver"}}, "background.*from 1 up"),
    ],
)
def test_unusable_input_is_named(change, words):
    good = {"labels": {1: "liver"}, "spacing": (1.0, 1.0, 1.0), "tolerance": 1.0}
    maps = {"prediction": np.zeros((4, 4, 4)), "truth": np.zeros((4, 4, 4))}
    with pytest.raises(InputError, match=words):
        score_case(**(maps | good | change))


def test_unknown_voxels_are_scored_in_neither_mask():
    truth, prediction = blobs(0), blobs(1)
    unknown = np.random.default_rng(0).random(truth.shape) < 0.3
    unknown[:6] = True
    asked = {"labels": {1: "one", 2: "two"}, "spacing": SPACING, "tolerance": 1.0}
    scores = score_case(prediction, np.where(unknown, 255, truth).astype(np.uint8), ignore_label=255, **asked)
    for value, organ in asked["labels"].items():
        masks = [(array == value) & ~unknown for array in (prediction, truth)]
        assert scores[organ]["dice"] == pytest.approx(slow_dice(*masks), abs=1e-6)
        assert scores[organ]["nsd"] == pytest.approx(deepminds_surface_dice(*masks, SPACING, 1.0), abs=1e-6)
        assert scores[organ]["hd95"] == pytest.approx(slow_hd95(*masks, SPACING), abs=1e-4)
    changed = np.where(unknown, 3 - prediction % 3, prediction)
    assert score_case(changed, np.where(unknown, 255, truth), ignore_label=255, **asked) == scores
    assert score_case(prediction, truth, ignore_label=255, **asked) == score_case(prediction, truth, **asked)


def test_an_organ_that_is_predicted_in_the_unknown_only_is_absent():
    truth, prediction = cube((2, 2, 2), (9, 9, 9), value=255), cube((3, 3, 3), (8, 8, 8))
    scores = score_case(prediction, truth, labels={1: "a"}, spacing=SPACING, tolerance=1.0, ignore_label=255)["a"]
    assert all(math.isnan(score) for score in scores.values())


# The handler


def item_of(prediction, truth, file: str, spacing=SPACING) -> dict:
    affine = np.diag([*spacing, 1.0])
    return {
        "image": MetaTensor(torch.zeros(1, 2, 2, 2), meta={"filename_or_obj": file}),
        "pred": MetaTensor(torch.from_numpy(prediction)[None], affine=affine),
        "reference": MetaTensor(torch.from_numpy(truth)[None], affine=affine),
    }


def run(handler: CaseScores, batches: list[list[dict]]) -> Engine:
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine)
    engine.run(batches)
    return engine


def rows_of(folder) -> list[dict]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


LABELS = {1: "liver", 2: "left kidney", 3: "never there"}


def hand_made_batches() -> list[list[dict]]:
    half = cube((0, 0, 0), (4, 4, 2)), cube((0, 0, 0), (4, 4, 4))  # Dice 2 * 32 / (32 + 64) = 2/3
    equal = cube((2, 2, 2), (9, 9, 9)), cube((2, 2, 2), (9, 9, 9))  # Dice 1
    missed = np.zeros((20, 20, 20), np.uint8), cube((8, 8, 8), (9, 9, 9), value=2)  # kidney 0, liver in neither
    return [[item_of(*half, "d/c1.nii.gz"), item_of(*equal, "d/c0.nii.gz")], [item_of(*missed, "d/c2.nii")]]


def test_handler_writes_rows_summary_and_metrics(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        engine = run(CaseScores(LABELS, 3.0, tmp_path / "eval"), hand_made_batches())

    rows = rows_of(tmp_path / "eval")
    assert [(r["case"], r["label"]) for r in rows] == [(c, o) for c in ("c0", "c1", "c2") for o in LABELS.values()]
    by_key = {(r["case"], r["label"]): r for r in rows}
    assert float(by_key["c0", "liver"]["dice"]) == 1.0
    assert float(by_key["c1", "liver"]["dice"]) == pytest.approx(2 / 3, abs=1e-6)
    assert [by_key["c2", "liver"][metric] for metric in ("dice", "nsd", "hd95")] == ["", "", ""]
    assert float(by_key["c2", "left kidney"]["dice"]) == 0.0
    assert by_key["c2", "left kidney"]["hd95"] == ""
    assert (by_key["c0", "liver"]["hd95"], by_key["c1", "liver"]["hd95"]) == ("0.000000", "6.000000")

    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    liver = summary["labels"]["liver"]["dice"]
    assert liver == {
        **{"mean": pytest.approx(5 / 6), "median": pytest.approx(5 / 6), "std": pytest.approx(1 / 6), "n": 2},
        "interval": pytest.approx([2 / 3, 1]),
    }
    absent = {"mean": None, "median": None, "std": None, "n": 0, "interval": None}
    assert summary["labels"]["never there"]["nsd"] == absent
    assert summary["labels"]["never there"]["hd95"] == {**absent, "missed": 0}
    assert summary["labels"]["left kidney"]["hd95"] == {**absent, "missed": 1}
    assert summary["mean_dice"] == pytest.approx((5 / 6 + 0) / 2)
    assert summary["cases"] == ["c0", "c1", "c2"]
    assert summary["tolerance"] == dict.fromkeys(LABELS.values(), 3.0)

    metrics = engine.state.metrics
    assert all(metrics[f"mean_{metric}"] == summary[f"mean_{metric}"] for metric in ("dice", "nsd", "hd95"))
    assert metrics["dice_liver"] == pytest.approx(5 / 6) and metrics["dice_left_kidney"] == 0.0
    assert math.isnan(metrics["dice_never_there"])

    assert "Scores of 3 cases" in caplog.text
    assert any(line.split()[:4] == ["liver", "0.8333", "0.1667", "2"] for line in caplog.text.splitlines())
    assert sorted(os.listdir(tmp_path / "eval")) == ["scores.csv", "scores.png", "summary.json"]
    assert (tmp_path / "eval" / "scores.csv").read_text().splitlines()[0] == "case,label,dice,nsd,hd95"


def test_spacing_comes_from_the_reference(tmp_path):
    """One voxel moved by one along Z: 1 mm or 3 mm, of which half of its surface is nearer than 2 mm."""
    pair = cube((5, 5, 5), (6, 6, 6)), cube((5, 5, 6), (6, 6, 7))
    for spacing, nsd, hd95 in [((1, 1, 1), 1.0, 1.0), ((1, 1, 3), 0.5, 3.0)]:
        engine = run(CaseScores({1: "a"}, 2.0, tmp_path), [[item_of(*pair, "x.nii.gz", spacing=spacing)]])
        assert engine.state.metrics["mean_nsd"] == pytest.approx(nsd)
        assert engine.state.metrics["mean_hd95"] == hd95


def test_the_handler_leaves_unknown_voxels_out(tmp_path):
    truth, prediction = cube((2, 2, 2), (6, 6, 6)), cube((2, 2, 2), (6, 6, 9))
    truth[:, :, 6:] = 255
    for ignore_label, dice in ((255, 1.0), (None, 2 * 64 / (64 + 112))):
        run(CaseScores({1: "a"}, 1.0, tmp_path, ignore_label=ignore_label), [[item_of(prediction, truth, "x.nii.gz")]])
        assert float(rows_of(tmp_path)[0]["dice"]) == pytest.approx(dice, abs=1e-6)


def test_organs_that_a_label_does_not_show_have_no_score():
    prediction, truth = blobs(0), blobs(1)
    options = {"labels": {1: "a", 2: "b", 3: "c"}, "spacing": SPACING, "tolerance": 1.0}
    whole, partial = (score_case(prediction, truth, labelled=labelled, **options) for labelled in (None, [2]))
    assert partial["b"] == whole["b"]
    assert all(math.isnan(score) for organ in ("a", "c") for score in partial[organ].values())


def test_the_means_are_over_the_cases_that_show_the_organ(tmp_path):
    items = items_in(tmp_path)
    items[0]["labelled"] = [2]  # its liver has Dice 1/3 or so; the liver of the others stays
    whole = evaluate(handler_for(tmp_path, output_dir=tmp_path / "whole"))[1].state.metrics
    partial = evaluate(handler_for(tmp_path, items=items))[1].state.metrics
    rows = {(row["case"], row["label"]): row["dice"] for row in rows_of(tmp_path / "eval")}
    before = {(row["case"], row["label"]): row["dice"] for row in rows_of(tmp_path / "whole")}
    assert before["s1/ct", "liver"] != "" and rows["s1/ct", "liver"] == ""
    assert {key: value for key, value in rows.items() if key != ("s1/ct", "liver")} == {
        key: value for key, value in before.items() if key != ("s1/ct", "liver")
    }
    others = [float(value) for (case, organ), value in before.items() if organ == "liver" and value and case != "s1/ct"]
    assert partial["dice_liver"] == pytest.approx(np.mean(others)) and partial["dice_liver"] != whole["dice_liver"]
    assert evaluate(handler_for(tmp_path, items=items))[0] == []
    items[0]["labelled"] = [1, 2]
    assert evaluate(handler_for(tmp_path, items=items))[0] == ["s1/ct.nii.gz"]  # scored again


def test_a_second_run_starts_afresh(tmp_path):
    handler = CaseScores({1: "liver"}, 1.0, tmp_path)
    batches = hand_made_batches()
    run(handler, batches)
    run(handler, batches[:1])
    assert [row["case"] for row in rows_of(tmp_path)] == ["c0", "c1"]


def test_metrics_are_there_for_a_logger_at_the_end_of_the_epoch(tmp_path):
    seen = {}
    engine = Engine(lambda engine, batch: batch)
    CaseScores({1: "liver"}, 1.0, tmp_path).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.update(engine.state.metrics))
    engine.run(hand_made_batches())
    assert seen["mean_dice"] == pytest.approx(5 / 6)


def test_labels_as_json_gives_them_leave_the_background_out(tmp_path):
    run(CaseScores({"0": "background", "1": "liver"}, 1.0, tmp_path), hand_made_batches())
    assert {row["label"] for row in rows_of(tmp_path)} == {"liver"}


def test_a_repeated_case_counts_once_and_equal_names_in_two_folders_stay_apart(tmp_path):
    equal = cube((2, 2, 2), (9, 9, 9)), cube((2, 2, 2), (9, 9, 9))
    files = ["p1/ct.nii.gz", "p2/ct.nii.gz", "p3/other.nii.gz", "p1/ct.nii.gz"]
    engine = run(CaseScores({1: "liver"}, 1.0, tmp_path), [[item_of(*equal, file)] for file in files])
    assert [row["case"] for row in rows_of(tmp_path)] == ["other", "p1/ct", "p2/ct"]
    assert engine.state.metrics["mean_dice"] == 1.0


def test_shapes_that_differ_are_named_with_the_case(tmp_path):
    item = item_of(np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 6), np.uint8), "d/liver_7.nii.gz")
    with pytest.raises(InputError, match=r"liver_7 has the shape \(4, 4, 4\), its label file \(4, 4, 6\)"):
        run(CaseScores(LABELS, 1.0, tmp_path), [[item]])
    assert not (tmp_path / "scores.csv").exists()


def test_orientations_that_differ_are_named_with_the_case(tmp_path):
    item = item_of(*[np.zeros((4, 4, 4), np.uint8)] * 2, "d/liver_7.nii.gz")
    item["pred"].affine = torch.diag(torch.tensor([-0.8, -1.1, 3.0, 1.0]))
    with pytest.raises(InputError, match="liver_7 has LPS orientation, its label file RAS"):
        run(CaseScores(LABELS, 1.0, tmp_path), [[item]])


def test_a_missing_reference_is_named(tmp_path):
    item = item_of(*[np.zeros((4, 4, 4), np.uint8)] * 2, "d/liver_7.nii.gz")
    del item["reference"]
    with pytest.raises(InputError, match="d/liver_7.nii.gz has no label map 'reference', only"):
        run(CaseScores(LABELS, 1.0, tmp_path), [[item]])


class BrightIsLiver(torch.nn.Module):
    def forward(self, image):
        return torch.cat([0.5 - image, image - 0.5], dim=1)


def test_monai_evaluator_scores_in_the_geometry_of_the_label_file(tmp_path):
    """The network sees the scan in RAS; the label stays as stored (Z, X, Y, flipped), and the scores are exact."""
    affine = np.array([[0, -0.8, 0, 7], [0, 0, -1.1, 8], [-3.0, 0, 0, 9], [0, 0, 0, 1.0]])
    truth = cube((3, 4, 2), (9, 12, 8), shape=(12, 16, 10))
    image = cube((3, 4, 2), (9, 12, 7), shape=(12, 16, 10))
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "ct1.nii.gz")
    nib.save(nib.Nifti1Image(truth, affine), tmp_path / "label1.nii.gz")
    keys = ["image", "reference"]
    preprocessing = Compose([LoadImaged(keys, ensure_channel_first=True), Orientationd("image", axcodes="RAS")])
    files = [{"image": str(tmp_path / "ct1.nii.gz"), "reference": str(tmp_path / "label1.nii.gz")}]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(files, preprocessing), batch_size=1),
        network=BrightIsLiver(),
        prepare_batch=lambda batch, device, non_blocking, **_: (batch["image"].to(device), None),
        postprocessing=Compose(
            [AsDiscreted("pred", argmax=True), Invertd("pred", transform=preprocessing, orig_keys="image")]
        ),
        val_handlers=[CaseScores({1: "liver"}, 1.0, tmp_path)],
    )
    evaluator.run()
    expected = deepminds_surface_dice(image > 0, truth > 0, (3.0, 0.8, 1.1), 1.0)
    assert 0.3 < expected < 0.95
    assert evaluator.state.metrics["mean_dice"] == pytest.approx(2 * 240 / (240 + 288))
    assert evaluator.state.metrics["mean_nsd"] == pytest.approx(expected)
    assert rows_of(tmp_path)[0]["case"] == "ct1"


def test_an_evaluator_that_does_not_decollate_is_told_so(tmp_path):
    engine = Engine(lambda engine, batch: batch)
    CaseScores(LABELS, 1.0, tmp_path).attach(engine)
    with pytest.raises(InputError, match="batch is a dict and its output a dict.*decollate"):
        engine.run([hand_made_batches()[0][0]])


# Resuming a stopped evaluation


MAPS = {  # of each case in its folder: prediction and truth
    "s1/ct.nii.gz": (cube((0, 0, 0), (4, 4, 2)), cube((0, 0, 0), (4, 4, 4))),
    "s2/ct.nii.gz": (cube((2, 2, 2), (9, 9, 9)), cube((2, 2, 2), (9, 9, 9))),
    "s3/other.nii": (np.zeros((20, 20, 20), np.uint8), cube((8, 8, 8), (9, 9, 9), value=2)),
}
SETTINGS = {"spacing": (1.5, 1.5, 2.0), "overlap": 0.5}


def items_in(folder) -> list[dict]:
    """Files of each case, which are not read (the scored maps are in `MAPS`), and of the model; made once."""
    items = [{"image": str(folder / file), "reference": str((folder / file).with_name("label.nii"))} for file in MAPS]
    for file in [*(Path(file) for item in items for file in item.values()), folder / "model.pt"]:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(file.name)
    return items


def handler_for(folder, **changes) -> CaseScores:
    asked = {
        **{"labels": LABELS, "tolerance": 3.0, "output_dir": folder / "eval", "items": items_in(folder)},
        **{"settings": SETTINGS, "model": folder / "model.pt", "resume": True},
    }
    return CaseScores(**(asked | changes))


def evaluate(handler: CaseScores, stop_after: int | None = None) -> tuple[list[str], Engine]:
    """Score the remaining cases, as the configs do; return these cases and the engine."""

    def network(engine: Engine, batch: list[dict]) -> list[dict]:
        if stop_after is not None and engine.state.iteration > stop_after:
            raise KeyboardInterrupt
        return batch

    engine = Engine(network)
    handler.attach(engine)
    left = {"/".join(Path(item["image"]).parts[-2:]): item["image"] for item in handler.unscored()}
    if left:
        engine.run([[item_of(*MAPS[name], file)] for name, file in left.items()])
    else:
        handler.finish(engine)
    return list(left), engine


def test_a_stopped_evaluation_goes_on_and_ends_as_an_unbroken_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole = handler_for(tmp_path, output_dir=tmp_path / "whole", resume=False)
    assert evaluate(whole)[0] == list(MAPS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(handler_for(tmp_path), stop_after=1)
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["cases"]

    assert evaluate(handler_for(tmp_path))[0] == ["s2/ct.nii.gz", "s3/other.nii"]
    assert "1 of 3 cases are already scored" in caplog.text
    for name in ("scores.csv", "summary.json"):
        assert (tmp_path / "eval" / name).read_text() == (tmp_path / "whole" / name).read_text()
    files = sorted(str(path.relative_to(tmp_path / "eval")) for path in (tmp_path / "eval").rglob("*.*"))
    assert files == [
        *("cases/other.json", "cases/s1/ct.json", "cases/s2/ct.json"),
        *("scores.csv", "scores.png", "summary.json"),
    ]


def test_a_case_without_a_picture_is_tried_again(tmp_path, caplog):
    evaluate(handler_for(tmp_path))
    lacking = items_in(tmp_path)[1]["image"]
    first = Failures(tmp_path / "eval")
    first.add(lacking, "picture", "no room")
    first.report(3)
    caplog.set_level(logging.INFO)
    failures = Failures(tmp_path / "eval", resume=True)
    failures.add(items_in(tmp_path)[0]["image"], "score", "it was damaged since")  # before the cases are chosen
    assert evaluate(handler_for(tmp_path, items=items_in(tmp_path)[1:], failures=failures))[0] == ["s2/ct.nii.gz"]
    assert "1 case lacks something" in caplog.text and failures.file.exists()  # until the run ends
    failures.report(3)
    assert failures.earlier() == {items_in(tmp_path)[0]["image"]}
    assert evaluate(handler_for(tmp_path, items=items_in(tmp_path)[1:], failures=failures))[0] == []


def test_with_nothing_left_the_table_is_written_again(tmp_path, caplog):
    first = evaluate(handler_for(tmp_path))[1]
    table = (tmp_path / "eval" / "scores.csv").read_text()
    (tmp_path / "eval" / "scores.csv").unlink()
    caplog.set_level(logging.INFO)
    left, engine = evaluate(handler_for(tmp_path))
    assert left == [] and "3 of 3 cases are already scored" in caplog.text
    assert (tmp_path / "eval" / "scores.csv").read_text() == table
    np.testing.assert_equal(engine.state.metrics, first.state.metrics)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tolerance": 2.0}, "different tolerance"),
        ({"labels": {1: "liver"}}, "different labels, tolerance"),
        ({"settings": SETTINGS | {"overlap": 0.7}}, "different overlap"),
        ({"settings": SETTINGS | {"amp": True}}, "different amp"),
        ({"model": None}, "different model"),
    ],
)
def test_cases_scored_under_other_settings_are_scored_again(tmp_path, caplog, change, reason):
    evaluate(handler_for(tmp_path))
    caplog.set_level(logging.INFO)
    assert evaluate(handler_for(tmp_path, **change))[0] == list(MAPS)
    assert "already scored" not in caplog.text and "3 cases are scored again" in caplog.text
    assert f"3 cases are scored again, such as {tmp_path}/s1/ct.nii.gz: it was scored with {reason}\n" in caplog.text
    assert evaluate(handler_for(tmp_path, **change))[0] == []


@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("s2/ct.nii.gz", ["s2/ct.nii.gz"]),
        ("s2/label.nii", ["s2/ct.nii.gz"]),
        ("model.pt", list(MAPS)),
    ],
)
@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_noticed(tmp_path, caplog, file, left, change):
    evaluate(handler_for(tmp_path))
    status = (tmp_path / file).stat()
    if change == "size":
        (tmp_path / file).write_text("other content")
    os.utime(tmp_path / file, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
    caplog.set_level(logging.INFO)
    assert evaluate(handler_for(tmp_path))[0] == left
    assert ("with different model" if file == "model.pt" else "before its files or 'labelled' changed") in caplog.text


@pytest.mark.parametrize("file", ["s2/ct.nii.gz", "s2/label.nii"])
def test_a_file_that_is_gone_costs_only_its_case(tmp_path, file):
    evaluate(handler_for(tmp_path))
    handler = handler_for(tmp_path)
    (tmp_path / file).unlink()
    assert [Path(item["image"]).relative_to(tmp_path).as_posix() for item in handler.unscored()] == ["s2/ct.nii.gz"]
    assert len(handler.kept) == 2


def test_without_resume_everything_is_scored_again(tmp_path):
    evaluate(handler_for(tmp_path))
    assert evaluate(handler_for(tmp_path, resume=False))[0] == list(MAPS)


def test_an_evaluation_of_other_cases_keeps_those_that_it_shares(tmp_path):
    items = items_in(tmp_path)
    evaluate(handler_for(tmp_path, items=items[1:]))
    left, engine = evaluate(handler_for(tmp_path, items=items[:1] + items[2:]))
    assert left == ["s1/ct.nii.gz"]  # the record of the other ct, cases/ct.json, is not mistaken for it
    assert [row["case"] for row in rows_of(tmp_path / "eval")] == ["ct"] * 3 + ["other"] * 3
    assert engine.state.metrics["dice_liver"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("content", ['{"files":', "{}", "[]", '{"settings": {}, "files": {}}'])
def test_a_damaged_record_is_scored_again(tmp_path, content):
    evaluate(handler_for(tmp_path))
    (tmp_path / "eval" / "cases" / "other.json").write_text(content)
    assert evaluate(handler_for(tmp_path))[0] == ["s3/other.nii"]


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(InputError, match="none.pt cannot be read: No such file"):
        handler_for(tmp_path, model=tmp_path / "none.pt")


def test_a_case_that_the_list_lacks_is_named(tmp_path):
    handler = handler_for(tmp_path, items=items_in(tmp_path)[1:])
    with pytest.raises(InputError, match="s1/ct.nii.gz is none of the 2 items"):
        run(handler, [[item_of(*MAPS["s1/ct.nii.gz"], str(tmp_path / "s1/ct.nii.gz"))]])


def test_the_first_file_of_several_sequences_is_the_case_and_all_of_them_are_watched(tmp_path):
    for name in ("t1.nii", "t2.nii", "label.nii"):
        (tmp_path / name).write_text(name)
    item = {"image": [str(tmp_path / "t1.nii"), str(tmp_path / "t2.nii")], "reference": str(tmp_path / "label.nii")}
    asked = {"labels": LABELS, "tolerance": 3.0, "output_dir": tmp_path / "eval", "items": [item], "resume": True}
    run(CaseScores(**asked), [[item_of(*MAPS["s1/ct.nii.gz"], str(tmp_path / "t1.nii"))]])
    assert CaseScores(**asked).unscored() == []
    (tmp_path / "t2.nii").write_text("another")
    assert CaseScores(**asked).unscored() == [item]


def test_monai_skips_an_empty_evaluation_and_finish_takes_its_place(tmp_path):
    image = cube((3, 4, 2), (9, 12, 7), shape=(12, 16, 10))
    for name in ("ct1.nii.gz", "label1.nii.gz"):
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / name)
    items = [{"image": str(tmp_path / "ct1.nii.gz"), "reference": str(tmp_path / "label1.nii.gz")}]
    tables = []
    for left in (1, 0):
        scores = CaseScores({1: "liver"}, 1.0, tmp_path / "eval", items=items, resume=True)
        data = Dataset(scores.unscored(), LoadImaged(["image", "reference"], ensure_channel_first=True))
        assert len(data) == left
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(data, batch_size=1),
            network=BrightIsLiver(),
            prepare_batch=lambda batch, device, non_blocking, **_: (batch["image"].to(device), None),
            postprocessing=AsDiscreted("pred", argmax=True),
            val_handlers=[scores],
        )
        if left:
            evaluator.run()
        else:
            with pytest.warns(UserWarning, match="empty"):
                evaluator.run()
            assert evaluator.state.metrics == {}
            scores.finish(evaluator)
        assert evaluator.state.metrics["mean_dice"] == 1.0
        tables.append((tmp_path / "eval" / "scores.csv").read_text())
    assert tables[0] == tables[1]


def start_two_processes(target, *arguments) -> None:
    # Forked, since importing MONAI in each process takes longer than everything else in this file.
    processes = torch.multiprocessing.start_processes(target, arguments, nprocs=2, join=False, start_method="fork")
    deadline = time.monotonic() + 60
    while not processes.join(timeout=1):
        assert time.monotonic() < deadline, "the two processes wait for each other"


def join_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def evaluate_on_one_rank(rank: int, folder: str) -> None:
    join_processes(rank, folder)
    half, equal, missed = [item for batch in hand_made_batches() for item in batch]
    # The sampler of a distributed run repeats a case to make both shares equal.
    share = [[half], [equal]] if rank == 0 else [[missed], [half]]
    engine = run(CaseScores(LABELS, 3.0, f"{folder}/rank{rank}"), share)
    with open(f"{folder}/metrics{rank}.json", "w") as file:
        json.dump(engine.state.metrics, file)
    torch.distributed.destroy_process_group()


def test_two_processes_write_one_table_of_all_cases(tmp_path):
    run(CaseScores(LABELS, 3.0, tmp_path / "alone"), hand_made_batches())
    start_two_processes(evaluate_on_one_rank, str(tmp_path))
    for name in ("scores.csv", "summary.json"):
        assert (tmp_path / "rank0" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert not (tmp_path / "rank1").exists()
    metrics = [json.loads((tmp_path / f"metrics{rank}.json").read_text()) for rank in (0, 1)]
    assert metrics[0]["mean_dice"] == metrics[1]["mean_dice"] == pytest.approx(5 / 12)


def go_on_on_one_rank(rank: int, folder: str) -> None:
    join_processes(rank, folder)
    handler = handler_for(Path(folder))
    # The second process is late: the first would have written its case by now if it did not wait.
    late = time.monotonic() + 0.7
    while rank == 1 and time.monotonic() < late and not Path(folder, "eval", "cases", "s2", "ct.json").exists():
        time.sleep(0.01)
    left = handler.unscored()
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine)
    file = left[rank]["image"]
    engine.run([[item_of(*MAPS["/".join(Path(file).parts[-2:])], file)]])
    Path(folder, f"left{rank}.json").write_text(json.dumps([[item["image"] for item in left], engine.state.metrics]))
    torch.distributed.destroy_process_group()


def test_two_processes_go_on_with_the_same_cases_and_write_all(tmp_path):
    alone = evaluate(handler_for(tmp_path, output_dir=tmp_path / "alone"))[1]
    with pytest.raises(KeyboardInterrupt):
        evaluate(handler_for(tmp_path), stop_after=1)
    start_two_processes(go_on_on_one_rank, str(tmp_path))
    for name in ("scores.csv", "summary.json"):
        assert (tmp_path / "eval" / name).read_text() == (tmp_path / "alone" / name).read_text()
    for rank in (0, 1):
        left, metrics = json.loads((tmp_path / f"left{rank}.json").read_text())
        assert [Path(file).parent.name for file in left] == ["s2", "s3"]
        np.testing.assert_equal(metrics, alone.state.metrics)


def test_what_was_evaluated_stands_in_the_summary_and_decides_no_score(tmp_path):
    image = cube((3, 4, 2), (9, 12, 7), shape=(12, 16, 10))
    for name in ("ct1.nii.gz", "label1.nii.gz"):
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / name)
    item = {"image": str(tmp_path / "ct1.nii.gz"), "reference": str(tmp_path / "label1.nii.gz")}
    asked = {"labels": {1: "liver"}, "tolerance": 1.0, "output_dir": tmp_path / "eval", "items": [item], "resume": True}
    run(CaseScores(**asked, details={"fold": 0}), [[item_of(image, image, item["image"])]])
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["evaluated"] == {"fold": 0}

    again = CaseScores(**asked, details={"fold": 1, "file": Path("model.pt")})
    assert again.unscored() == []
    again.finish(Engine(lambda engine, batch: None))
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["evaluated"] == {"fold": 1, "file": "model.pt"} and summary["mean_dice"] == 1.0
