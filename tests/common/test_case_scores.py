# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Scores of label maps equal a slow formula, and the table of an evaluation says what was scored."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import AsDiscreted, Compose, Invertd, LoadImaged, Orientationd
from scipy import ndimage

from bundles.common.case_scores import CaseScores, case_name, score_case
from bundles.common.input_error import InputError

SPACING = (0.8, 1.1, 3.0)


def slow_dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    both = sum(bool(p) and bool(t) for p, t in zip(prediction.flat, truth.flat, strict=True))
    return 2 * both / (np.count_nonzero(prediction) + np.count_nonzero(truth))


def slow_surface_dice(prediction: np.ndarray, truth: np.ndarray, spacing, tolerance: float) -> float:
    """On the whole volume, by distance maps: no crop and no search tree."""
    surfaces = []
    for mask in (prediction, truth):
        inside = np.pad(mask, 1)
        six_neighbours = [np.roll(inside, shift, axis) for axis in range(3) for shift in (-1, 1)]
        surfaces.append((inside & ~np.logical_and.reduce(six_neighbours))[1:-1, 1:-1, 1:-1])
    near = 0
    for surface, other in (surfaces, surfaces[::-1]):
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)
        near += np.count_nonzero(distance[surface] <= tolerance + 1e-5)
    return near / (np.count_nonzero(surfaces[0]) + np.count_nonzero(surfaces[1]))


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
def test_scores_equal_the_slow_formula_on_blobs_that_touch_the_border(seed, tolerance):
    truth, prediction = blobs(seed), blobs(seed)
    # A prediction that is shifted, and noisy in one part.
    prediction = np.roll(prediction, 1, axis=seed % 3)
    prediction[:8] = blobs(seed + 100)[:8]
    labels = {1: "one", 2: "two", 3: "three"}
    scores = score_case(prediction, truth, labels=labels, spacing=SPACING, tolerance=tolerance)
    assert list(scores) == ["one", "two", "three"]
    for value, organ in labels.items():
        assert (truth == value)[0].any() or (truth == value)[-1].any()
        expected = slow_surface_dice(prediction == value, truth == value, SPACING, tolerance)
        assert scores[organ]["nsd"] == pytest.approx(expected, abs=1e-6)
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
    assert tight["nsd"] == pytest.approx(slow_surface_dice(prediction > 0, truth > 0, SPACING, 1.0), abs=1e-6)


def test_a_mask_that_fills_the_volume_has_its_surface_at_the_border():
    """Truth 4x4x4 all ones: 56 of 64 voxels are surface. Prediction lacks the voxel at one corner.

    Its three face neighbours are surface already, so it has 55 surface voxels, all on the truth's surface. The
    missing corner is 1 mm from the prediction's surface, beyond a tolerance of 0.5 mm.
    """
    truth = np.ones((4, 4, 4), dtype=np.uint8)
    prediction = truth.copy()
    prediction[0, 0, 0] = 0
    scores = score_case(prediction, truth, labels={1: "a"}, spacing=(1, 1, 1), tolerance=0.5)["a"]
    assert scores["nsd"] == pytest.approx((55 + 55) / (55 + 56))
    assert scores["dice"] == pytest.approx(2 * 63 / (63 + 64))


def test_hand_made_dice_and_tolerance_in_mm():
    """Two voxels, 2 apart along Z where voxels are 3 mm: 6 mm."""
    truth, prediction = cube((5, 5, 5), (6, 6, 6)), cube((5, 5, 7), (6, 6, 8))
    for tolerance, expected in [(5.9, 0.0), (6.0, 1.0)]:
        scores = score_case(prediction, truth, labels={1: "a"}, spacing=SPACING, tolerance=tolerance)
        assert scores == {"a": {"dice": 0.0, "nsd": expected}}


def test_equal_masks_score_one_and_other_values_are_ignored():
    truth = cube((2, 3, 4), (9, 9, 9), value=4)
    prediction = truth + cube((15, 15, 15), (18, 18, 18), value=7)
    scores = score_case(prediction, truth, labels={4: "spleen"}, spacing=SPACING, tolerance=0)
    assert scores == {"spleen": {"dice": 1.0, "nsd": 1.0}}


def test_absent_in_both_is_nan_and_in_one_only_is_zero():
    truth = cube((2, 2, 2), (5, 5, 5), value=1)
    prediction = cube((2, 2, 2), (5, 5, 5), value=2)
    scores = score_case(
        prediction, truth, labels={1: "missed", 2: "invented", 3: "absent"}, spacing=SPACING, tolerance=1
    )
    assert scores["missed"] == {"dice": 0.0, "nsd": 0.0}
    assert scores["invented"] == {"dice": 0.0, "nsd": 0.0}
    assert math.isnan(scores["absent"]["dice"]) and math.isnan(scores["absent"]["nsd"])


def test_tolerance_may_differ_by_organ():
    truth = cube((5, 5, 5), (9, 9, 9), value=1) + cube((12, 12, 12), (16, 16, 16), value=2)
    prediction = np.roll(truth, 1, axis=2)
    scores = score_case(
        prediction, truth, labels={1: "a", 2: "b"}, spacing=SPACING, tolerance={"a": 3.0, "b": 0.5, "unused": 9}
    )
    assert scores["a"]["nsd"] == 1.0 and scores["b"]["nsd"] < 1.0
    assert scores["a"]["dice"] == scores["b"]["dice"] == 0.75


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
        ({"spacing": (1.0, 0.0, 1.0)}, r"spacing is \[1.0, 0.0, 1.0\]"),
        ({"tolerance": -1.0}, "liver.*-1.0"),
        ({"tolerance": {"spleen": 1.0}}, "liver.*spleen"),
        ({"labels": {0: "background", 1: "liver"}}, "background.*from 1 up"),
    ],
)
def test_unusable_input_is_named(change, words):
    good = {"labels": {1: "liver"}, "spacing": (1.0, 1.0, 1.0), "tolerance": 1.0}
    maps = {"prediction": np.zeros((4, 4, 4)), "truth": np.zeros((4, 4, 4))}
    with pytest.raises(InputError, match=words):
        score_case(**(maps | good | change))


@pytest.mark.parametrize(
    ("file", "name"),
    [("a/b/img1.nii.gz", "img1"), ("img2.nii", "img2"), ("/x/ct.v2.nii.gz", "ct.v2"), ("s.nrrd", "s.nrrd")],
)
def test_case_name_is_the_file_name(file, name):
    assert case_name(file) == name


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
    assert by_key["c2", "liver"]["dice"] == by_key["c2", "liver"]["nsd"] == ""
    assert float(by_key["c2", "left kidney"]["dice"]) == 0.0

    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    liver = summary["labels"]["liver"]["dice"]
    assert liver == {"mean": pytest.approx(5 / 6), "std": pytest.approx(1 / 6), "n": 2}
    assert summary["labels"]["never there"]["nsd"] == {"mean": None, "std": None, "n": 0}
    assert summary["mean_dice"] == pytest.approx((5 / 6 + 0) / 2)
    assert summary["cases"] == ["c0", "c1", "c2"]
    assert summary["tolerance"] == dict.fromkeys(LABELS.values(), 3.0)

    metrics = engine.state.metrics
    assert metrics["mean_dice"] == summary["mean_dice"] and metrics["mean_nsd"] == summary["mean_nsd"]
    assert metrics["dice_liver"] == pytest.approx(5 / 6) and metrics["dice_left_kidney"] == 0.0
    assert math.isnan(metrics["dice_never_there"])

    assert "Scores of 3 cases" in caplog.text
    assert any(line.split()[:4] == ["liver", "0.8333", "0.1667", "2"] for line in caplog.text.splitlines())
    assert sorted(os.listdir(tmp_path / "eval")) == ["scores.csv", "summary.json"]


def test_spacing_comes_from_the_reference(tmp_path):
    """One voxel moved by one along Z: 1 mm or 3 mm, at a tolerance of 2 mm."""
    pair = cube((5, 5, 5), (6, 6, 6)), cube((5, 5, 6), (6, 6, 7))
    for spacing, expected in [((1, 1, 1), 1.0), ((1, 1, 3), 0.0)]:
        engine = run(CaseScores({1: "a"}, 2.0, tmp_path), [[item_of(*pair, "x.nii.gz", spacing=spacing)]])
        assert engine.state.metrics["mean_nsd"] == expected


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
    with pytest.raises(InputError, match="liver_7 lies in LPS orientation, its label file in RAS"):
        run(CaseScores(LABELS, 1.0, tmp_path), [[item]])


def test_a_missing_reference_is_named(tmp_path):
    item = item_of(*[np.zeros((4, 4, 4), np.uint8)] * 2, "d/liver_7.nii.gz")
    del item["reference"]
    with pytest.raises(InputError, match="'reference' of the case d/liver_7.nii.gz .* but is NoneType"):
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
    expected = slow_surface_dice(image > 0, truth > 0, (3.0, 0.8, 1.1), 1.0)
    assert 0.3 < expected < 0.95
    assert evaluator.state.metrics["mean_dice"] == pytest.approx(2 * 240 / (240 + 288))
    assert evaluator.state.metrics["mean_nsd"] == pytest.approx(expected)
    assert rows_of(tmp_path)[0]["case"] == "ct1"


def test_an_evaluator_that_does_not_decollate_is_told_so(tmp_path):
    engine = Engine(lambda engine, batch: batch)
    CaseScores(LABELS, 1.0, tmp_path).attach(engine)
    with pytest.raises(InputError, match="batch is a dict and its output a dict.*decollate"):
        engine.run([hand_made_batches()[0][0]])


def evaluate_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half, equal, missed = [item for batch in hand_made_batches() for item in batch]
    # The sampler of a distributed run repeats a case to make both shares equal.
    share = [[half], [equal]] if rank == 0 else [[missed], [half]]
    engine = run(CaseScores(LABELS, 3.0, f"{folder}/rank{rank}"), share)
    with open(f"{folder}/metrics{rank}.json", "w") as file:
        json.dump(engine.state.metrics, file)
    torch.distributed.destroy_process_group()


def test_two_processes_write_one_table_of_all_cases(tmp_path):
    run(CaseScores(LABELS, 3.0, tmp_path / "alone"), hand_made_batches())
    # Forked, since importing MONAI anew in each process takes longer than all else in this file.
    processes = torch.multiprocessing.start_processes(
        evaluate_on_one_rank, (str(tmp_path),), nprocs=2, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 60
    while not processes.join(timeout=1):
        assert time.monotonic() < deadline, "the two processes wait for each other"
    for name in ("scores.csv", "summary.json"):
        assert (tmp_path / "rank0" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert not (tmp_path / "rank1").exists()
    metrics = [json.loads((tmp_path / f"metrics{rank}.json").read_text()) for rank in (0, 1)]
    assert metrics[0]["mean_dice"] == metrics[1]["mean_dice"] == pytest.approx(5 / 12)
