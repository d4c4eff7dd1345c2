# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The results table equals one computed by hand from fixed masks."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.image import imread
from monai.data import MetaTensor

from bundles.common.data.list_fingerprint import fingerprint
from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.decathlon.evaluations import Evaluation
from bundles.decathlon.results import gather
from bundles.decathlon.results_table import results_table
from bundles.segmentation.results.case_scores import CaseScores

from ..workflows.command_line import BUNDLES, run_bundle, succeed

TASKS_FILE = str(BUNDLES / "swin_unetr_msd" / "configs" / "tasks.yaml")
HIPPOCAMPUS, SPLEEN = {1: "anterior", 2: "posterior"}, {1: "spleen"}
EQUAL, HALF, NOTHING = 4, 2, 0  # slices of a box of four: Dice 1, 2 * 2 / (2 + 4) = 2/3, and 0


def box(slices: int, value: int) -> np.ndarray:
    """Label map at 1 mm spacing: a box of 2 x 2 x slices voxels, at a different position for each label."""
    array = np.zeros((16, 8, 8), np.uint8)
    array[6 * value : 6 * value + 2, 2:4, 2 : 2 + slices] = value
    return array


def evaluate(folder: Path, task: str, labels: dict[int, str], cases: dict, *, start: str, fold: int) -> str:
    """Score fixed masks as evaluate.yaml does; ``cases`` gives the number of predicted slices of each label."""
    model = {"file": f"{folder.name}.pt", "start": start, "start_file": None, "held_out": True}
    details = {"task": task, "section": "validation", "split": {"fold": fold}, "models": [model]}
    scores = CaseScores(labels, 5.0, folder, details=details)  # 5 mm: NSD is 1 where anything is predicted
    affine = np.eye(4)
    items = [
        {
            "image": MetaTensor(torch.zeros(1, 2, 2, 2), meta={"filename_or_obj": f"imagesTr/{case}.nii.gz"}),
            "pred": MetaTensor(
                torch.from_numpy(sum(box(s, v) for v, s in zip(labels, slices, strict=True)))[None], affine=affine
            ),
            "reference": MetaTensor(torch.from_numpy(sum(box(EQUAL, value) for value in labels))[None], affine=affine),
        }
        for case, slices in cases.items()
    ]
    engine = Engine(lambda engine, batch: batch)
    scores.attach(engine)
    engine.run([items])
    return str(folder)


@pytest.fixture
def evaluations(tmp_path) -> Path:
    """Task04 with two folds pre-trained and one from scratch, Task09 with one fold of each."""
    folder, task04, task09 = tmp_path / "runs", "Task04_Hippocampus", "Task09_Spleen"
    evaluate(folder / "p0", task04, HIPPOCAMPUS, {"a": (EQUAL, HALF)}, start="encoder", fold=0)
    evaluate(folder / "p1", task04, HIPPOCAMPUS, {"b": (HALF, NOTHING)}, start="encoder", fold=1)
    evaluate(folder / "s0", task04, HIPPOCAMPUS, {"a": (HALF, HALF)}, start="scratch", fold=0)
    evaluate(folder / "p9", task09, SPLEEN, {"c": (EQUAL,), "d": (HALF,)}, start="encoder", fold=0)
    evaluate(folder / "s9", task09, SPLEEN, {"c": (HALF,), "d": (NOTHING,)}, start="scratch", fold=0)
    return folder


# Columns that are not listed are empty. Pre-trained, over cases a and b of Task04: anterior (1 + 2/3) / 2, posterior
# (2/3 + 0) / 2. The 95th percentile of the distances of HALF is 2 mm, because the four farthest of its sixteen voxels
# are 2 mm away; NOTHING has no distance. Pairs: case a of Task04 (a single one, so no interval), and c and d of Task09,
# whose bootstrap means are 1/3, 1/2 and 2/3.
BY_HAND = {
    ("Task04_Hippocampus", "mean"): {
        **{"pretrained_n": 2, "pretrained_dice": (5 / 6 + 1 / 3) / 2, "pretrained_nsd": (1 + 1 / 2) / 2},
        **{"scratch_n": 1, "scratch_dice": 2 / 3, "scratch_nsd": 1},
        **{"difference_dice": (1 / 3 + 0) / 2, "difference_nsd": 0, "difference_n": 1},
    },
    ("Task04_Hippocampus", "anterior"): {
        **{
            "pretrained_n": 2,
            "pretrained_dice": 5 / 6,
            "pretrained_nsd": 1,
            "pretrained_hd95": (0 + 2) / 2,
            "pretrained_hd95_missed": 0,
        },
        **{"scratch_n": 1, "scratch_dice": 2 / 3, "scratch_nsd": 1, "scratch_hd95": 2, "scratch_hd95_missed": 0},
        **{"difference_dice": 1 / 3, "difference_nsd": 0, "difference_n": 1},
    },
    ("Task04_Hippocampus", "posterior"): {
        **{
            "pretrained_n": 2,
            "pretrained_dice": 1 / 3,
            "pretrained_nsd": 1 / 2,
            "pretrained_hd95": 2,
            "pretrained_hd95_missed": 1,
        },
        **{"scratch_n": 1, "scratch_dice": 2 / 3, "scratch_nsd": 1, "scratch_hd95": 2, "scratch_hd95_missed": 0},
        **{"difference_dice": 0, "difference_nsd": 0, "difference_n": 1},
    },
    ("Task09_Spleen", "mean"): {
        **{"pretrained_n": 2, "pretrained_dice": 5 / 6, "pretrained_nsd": 1},
        **{"scratch_n": 2, "scratch_dice": 1 / 3, "scratch_nsd": 1 / 2},
        **{"difference_dice": 1 / 2, "difference_dice_low": 1 / 3, "difference_dice_high": 2 / 3},
        **{"difference_nsd": 1 / 2, "difference_nsd_low": 0, "difference_nsd_high": 1, "difference_n": 2},
        **{"paper_pretrained_dice": 0.9732, "paper_scratch_dice": 0.9605},
    },
    ("Task10_Colon", "mean"): {"paper_pretrained_dice": 0.4338, "paper_scratch_dice": 0.3483},
    ("Task10_Colon", "colon_cancer"): {},
    ("Task01_BrainTumour", "edema"): {},
    ("all tasks", "mean"): {
        **{"pretrained_n": 2, "pretrained_dice": (7 / 12 + 5 / 6) / 2, "pretrained_nsd": (3 / 4 + 1) / 2},
        **{"scratch_n": 2, "scratch_dice": (2 / 3 + 1 / 3) / 2, "scratch_nsd": (1 + 1 / 2) / 2},
        **{"difference_dice": (1 / 6 + 1 / 2) / 2, "difference_nsd": 1 / 4, "difference_n": 2},
        **{"paper_pretrained_dice": 0.7868, "paper_pretrained_nsd": 0.8928},
    },
}


def test_the_table_of_fixed_masks_is_the_one_worked_out_by_hand(tmp_path, evaluations):
    options = {"cwd": tmp_path, "evaluations": f"{evaluations}/*", "output_dir": tmp_path / "out"}
    succeed(run_bundle("swin_unetr_msd", "results.yaml", **options))
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 28  # ten tasks, their seventeen labels, and the mean over tasks
    table = {(row["task"], row["label"]): row for row in rows}
    for key, expected in BY_HAND.items():
        found = {name: float(value) for name, value in list(table[key].items())[2:] if value}
        assert found == pytest.approx(expected, abs=1e-6), key

    text = (tmp_path / "out" / "results.md").read_text()
    assert (
        "| Task04_Hippocampus | anterior | 2 / 1 | 0.8333 | 0.6667 | +0.3333, 1 | 1.0000 | 1.0000 | +0.0000 | 1.00 | 2.00 |  |  |  |"
        in text
    )
    assert (
        "| Task04_Hippocampus | posterior | 2 / 1 | 0.3333 | 0.6667 | +0.0000, 1 | 0.5000 | 1.0000 | +0.0000 | 2.00 (1 missed) | 2.00 |"
        in text
    )
    assert "**+0.5000 [+0.3333, +0.6667], 2**" in text
    assert f"| {evaluations}/p1 | Task04_Hippocampus | pretrained | validation | 1 | 1 | encoder |" in text
    picture = imread(tmp_path / "out" / "results.png")
    assert picture.shape[0] > 600 and picture.shape[1] == 1200


def test_arms_may_be_said_and_must_name_an_evaluation(tmp_path):
    folder = evaluate(tmp_path / "x", "Task09_Spleen", SPLEEN, {"c": (EQUAL,)}, start="model", fold=0)
    options = {"evaluations": folder, "output_dir": str(tmp_path / "out"), "tasks_file": TASKS_FILE, "published": {}}
    rows = {(row["task"], row["label"]): row for row in gather(**options, arms={f"{tmp_path}/./x": "scratch"})}
    assert rows["Task09_Spleen", "spleen"]["scratch_dice"] == 1.0
    assert math.isnan(rows["Task09_Spleen", "spleen"]["pretrained_dice"])
    with pytest.raises(InputError, match="--arms names runs/y, not one of the evaluations: .*x"):
        gather(**options, arms={"runs/y": "scratch"})


def test_folds_are_pooled_over_cases_and_not_averaged_over_folds():
    """Three cases with Dice 1 in one fold and one with Dice 0 in the other: 3/4, whereas the mean of folds is 1/2."""

    def fold(number: int, scores: dict[str, float]) -> Evaluation:
        rows = [
            {"case": case, "label": "own", "dice": dice, "nsd": dice, "hd95": math.nan} for case, dice in scores.items()
        ]
        return Evaluation(str(number), "Task99_Own", "scratch", {}, {"own": 1.0}, rows)

    table = results_table([fold(0, {"a": 1.0, "b": 1.0, "c": 1.0}), fold(1, {"d": 0.0})], labels={}, published={})
    assert [(row["task"], row["label"], row["scratch_dice"]) for row in table] == [
        ("Task99_Own", "mean", 0.75),  # a task that is not in the table has rows, too
        ("Task99_Own", "own", 0.75),
        ("all tasks", "mean", 0.75),
    ]


def test_a_task_of_the_users_own_has_its_rows_after_the_ten(tmp_path):
    """Aorta sorts before Task01. One of its cases is predicted completely, the other not at all."""
    cases = {"a": (EQUAL, HALF), "b": (NOTHING, HALF)}
    own = evaluate(tmp_path / "own", "Aorta", {1: "lumen", 2: "wall"}, cases, start="scratch", fold=0)
    spleen = evaluate(tmp_path / "s9", "Task09_Spleen", SPLEEN, {"c": (EQUAL,)}, start="scratch", fold=0)
    rows = gather(evaluations=[own, spleen], output_dir=str(tmp_path / "out"), tasks_file=TASKS_FILE, published={})
    last = [(row["task"], row["label"]) for row in rows[-6:]]
    assert last[:2] == [("Task10_Colon", "mean"), ("Task10_Colon", "colon_cancer")]
    assert last[2:] == [("Aorta", "mean"), ("Aorta", "lumen"), ("Aorta", "wall"), ("all tasks", "mean")]
    assert len(rows) == 28 + 3
    assert [row["scratch_dice"] for row in rows[-4:-1]] == pytest.approx([(1 / 2 + 2 / 3) / 2, 1 / 2, 2 / 3])
    assert (rows[-1]["scratch_dice"], rows[-1]["scratch_n"]) == (1.0, 1)  # only tasks of the Decathlon count
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| Aorta | lumen | - / 2 |  | 0.5000 |" in text and text.index("Task10_Colon") < text.index("Aorta")


def test_what_evaluate_yaml_writes_is_what_the_table_needs(tmp_path, record):
    """With random weights whose file records that the two cases were held out."""
    labels, cases = {"0": "background", "1": "spleen"}, []
    for number in (1, 2):
        image = np.random.default_rng(number).normal(0, 100, (14, 12, 10)).astype(np.int16)
        files = {
            "image": tmp_path / "imagesTr" / f"s{number}.nii.gz",
            "label": tmp_path / "labelsTr" / f"s{number}.nii.gz",
        }
        for file, voxels in zip(files.values(), (image, (image > 0).astype(np.uint8)), strict=True):
            file.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([3.0, 3, 3, 1])), file)
        cases.append({key: str(file.relative_to(tmp_path)) for key, file in files.items()})
    content = {"labels": labels, "modality": {"0": "CT"}, "training": cases[:1], "validation": cases}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    held_out = fingerprint([{"image": str(tmp_path / case["image"])} for case in cases])
    trained = {"start": None, "validation_scans": held_out, "fold": None, "folds": None, "seed": 0}
    network = build_swin_unetr(record, out_channels=2)
    model = {
        "model": network.state_dict(),
        "encoder": record,
        "labels": labels,
        "task": "Task09_Spleen",
        "trained": trained,
    }
    save_atomically(model, tmp_path / "model.pt")

    options = {
        "cwd": tmp_path,
        "dataset_dir": tmp_path,
        "preset": "cpu",
        "roi_size": [64, 64, 32],
        "output_dir": tmp_path / "x",
    }
    succeed(run_bundle("swin_unetr_msd", "evaluate.yaml", pretrained_model=tmp_path / "model.pt", **options))
    evaluated = json.loads((tmp_path / "x" / "summary.json").read_text())["evaluated"]
    assert evaluated["task"] == "Task09_Spleen" and evaluated["section"] == "validation"
    assert evaluated["split"] == {"fold": None, "folds": None, "seed": 0}
    (facts,) = evaluated["models"]
    assert (facts["file"], facts["start"], facts["held_out"]) == (str(tmp_path / "model.pt"), "scratch", True)

    rows = gather(
        evaluations=str(tmp_path / "x"), output_dir=str(tmp_path / "out"), tasks_file=TASKS_FILE, published={}
    )
    assert [row["scratch_n"] for row in rows if row["task"] == "Task09_Spleen"] == [2, 2]
    assert "Caution" not in (tmp_path / "out" / "results.md").read_text()
