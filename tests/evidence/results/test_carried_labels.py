# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Carried labels are compared with the hidden ones by hand-counted Dice, and masks are scored as a network's are."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from bundles.common.errors import InputError
from bundles.common.scans.nifti_writing import write_nifti
from evidence.results.carried_labels import PICTURE, carried_table, compare_with_truth, scores_of_masks
from tools.bundle_runs import Run

ROW = {"labels": {"0": "background", "1": "liver", "2": "spleen"}, "nsd_tolerance": 4.0}


def write(path, *values):
    write_nifti(path, voxels=np.array(values, np.uint8).reshape(4, 2, 1), affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    return str(path)


def entry(folder, name, truth):
    return {
        "image": str(folder / "images" / f"{name}.nii.gz"),
        "label": write(folder / "labels" / f"{name}.nii.gz", *truth),
    }


@pytest.fixture
def run(tmp_path):
    """Scans x and y were labelled, z was left out before registration."""
    entries = [
        entry(tmp_path, "x", (1, 1, 1, 1, 2, 2, 0, 0)),
        entry(tmp_path, "y", (1, 1, 0, 0, 0, 0, 0, 0)),
        entry(tmp_path, "z", (1, 0, 0, 0, 0, 0, 0, 0)),
    ]
    folder = tmp_path / "run"
    write(folder / "carried" / "masks" / "x_seg.nii.gz", 1, 1, 1, 0, 2, 2, 2, 2)
    write(folder / "carried" / "masks" / "y_seg.nii.gz", 0, 0, 0, 0, 0, 0, 0, 0)
    table = [
        "scan,organ,kept,reason,agreement,confidence,volume_ml",
        "x,liver,true,good,0.9,0.8,1",
        "x,spleen,true,good,0.7,,1",
    ]
    table += ["y,*,false,left out,,,", "y,liver,false,bad,0.1,,0", "y,spleen,false,bad,,,0", "z,*,false,no body,,,"]
    (folder / "carried" / "propagation.csv").write_text("\n".join(table) + "\n")
    labelled = {"image": str(tmp_path / "images" / "a.nii.gz"), "label": str(tmp_path / "a_label.nii.gz")}
    return folder, Run(
        name="carry_arm_n1_seed0",
        kind="propagation",
        facts={"arm": "arm", "n": 1, "seed": 0, "steps": 3},
        commands=(),
        lists={
            "carried": {"training": [labelled], "unlabelled": [{"image": each["image"]} for each in entries]},
            "truth": {"test": entries},
            "scored": {"test": entries},
        },
        cases={"training": ["a"], "unlabelled": ["X", "Y", "Z"], "scored": ["X", "Y", "Z"]},
        row=ROW,
    )


def test_dice_with_the_hidden_labels(run):
    folder, planned = run
    write(folder / "carried" / "masks" / "y_seg.nii.gz", 0, 0, 0, 0, 2, 2, 0, 0)  # an organ that its own label lacks
    rows = compare_with_truth(planned, folder)
    assert [(row["case"], row["label"], row["agreement"], row["kept"]) for row in rows] == [
        ("X", "liver", 0.9, True),
        ("X", "spleen", 0.7, True),
        ("Y", "liver", 0.1, False),
        ("Y", "spleen", None, False),
    ]
    dice = [row["dice"] for row in rows]
    assert dice[:3] == pytest.approx([2 * 3 / 7, 2 * 2 / 6, 0.0], abs=1e-6) and dice[3] is None
    assert (folder / PICTURE).stat().st_size > 1000


def test_the_table_of_all_propagations(run, tmp_path):
    folder, planned = run
    rows = compare_with_truth(planned, folder)
    assert carried_table(tmp_path) == ""
    done = tmp_path / "runs" / planned.name / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text(
        json.dumps(
            {"settings": {"facts": dict(planned.facts), "cases": planned.cases}, "carried": rows, "seconds": 120.0}
        )
    )
    mean = (6 / 7 + 4 / 6 + 0) / 3
    line = carried_table(tmp_path).splitlines()[2]
    assert line == f"| arm | 1 | 0 | 1 of 3 | {mean:.3f} | {(6 / 7 + 4 / 6) / 2:.3f} | 1.00 |  | 2 |"


def test_agreement_that_knows_organs_but_not_scans(run, tmp_path):
    """Easy organ: high agreement, high Dice. Within each organ the order of the scans is the opposite."""
    folder, planned = run
    values = {"easy": [(0.9, 0.80), (0.8, 0.85), (0.7, 0.90)], "hard": [(0.3, 0.1), (0.2, 0.2), (0.1, 0.3)]}
    rows = [
        {"case": f"c{i}", "label": organ, "agreement": agreed, "kept": True, "dice": dice}
        for organ, pairs in values.items()
        for i, (agreed, dice) in enumerate(pairs)
    ]
    done = tmp_path / "runs" / planned.name / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text(
        json.dumps(
            {"settings": {"facts": dict(planned.facts), "cases": planned.cases}, "carried": rows, "seconds": 60.0}
        )
    )
    assert carried_table(tmp_path).splitlines()[2].endswith("| 0.54 | -1.00 | 1 |")


def test_masks_are_scored_and_a_missing_one_is_background(run):
    folder, planned = run
    rows = {(row["case"], row["label"]): row for row in scores_of_masks(planned, folder)}
    assert len(rows) == 6
    assert rows["X", "liver"]["dice"] == pytest.approx(6 / 7)
    assert rows["Y", "liver"]["dice"] == 0.0 and rows["Z", "liver"]["dice"] == 0.0
    assert rows["Y", "spleen"]["dice"] is None and rows["Z", "spleen"]["dice"] is None


@pytest.mark.parametrize(
    "reason",
    ["/data/z.nii.gz cannot be read: Input/output error", "an unexpected error, OSError: gone", "its process died"],
)
def test_a_scan_that_failed_for_a_moment_is_no_background(run, reason):
    folder, planned = run
    table = folder / "carried" / "propagation.csv"
    table.write_text(table.read_text().replace("no body", f'"{reason}"'))
    with pytest.raises(InputError, match="z.nii.gz has no carried mask, and not for what it shows"):
        scores_of_masks(planned, folder)


def test_hidden_labels_are_read_as_an_evaluation_reads_them(run, tmp_path):
    """Turned files, a fourth axis, 0.9999 for 1 and unknown voxels change no score of what is known."""
    folder, planned = run
    before = compare_with_truth(planned, folder), scores_of_masks(planned, folder)
    path = planned.lists["truth"]["test"][0]["label"]
    image = nib.load(path)
    values = np.asarray(image.dataobj).astype(np.float32)
    values[values == 1] = 0.9999
    turned = nib.Nifti1Image(values, image.affine).as_reoriented([[0, -1], [1, 1], [2, 1]])
    nib.save(nib.Nifti1Image(turned.get_fdata(dtype=np.float32)[..., None], turned.affine), path)
    assert (compare_with_truth(planned, folder), scores_of_masks(planned, folder)) == before
    write(tmp_path / "labels" / "x.nii.gz", 1, 1, 1, 255, 2, 2, 255, 255)  # where the mask was wrong
    assert [row["dice"] for row in scores_of_masks(planned, folder)[:2]] == [1.0, 1.0]


def test_the_table_counts_all_scans_with_a_label(run, tmp_path):
    """Also those of the unlabelled section, which have no hidden label to compare with."""
    folder, planned = run
    rows = compare_with_truth(planned, folder)
    done = tmp_path / "runs" / planned.name
    shutil.copytree(folder, done)
    with open(done / "carried" / "propagation.csv", "a") as table:
        table.write("u,liver,true,good,0.9,0.8,1\n")
    content = {
        "settings": {"facts": {**planned.facts, "steps": 4}, "cases": planned.cases},
        "carried": rows,
        "seconds": 1,
    }
    (done / "done.json").write_text(json.dumps(content))
    assert "| 2 of 4 |" in carried_table(tmp_path)
