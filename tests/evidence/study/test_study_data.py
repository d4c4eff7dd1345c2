# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A study's data are those its folder was made with, have the labels of its row, and name the organs they lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from bundles.common.errors import InputError
from evidence.runs.planning import planner_of
from evidence.study.reading import check_study
from evidence.study.study_data import absent_labels, prepare_folder

from ..made_up_study import CONTENT, LABELS, ROW, rewrite


def write_scan(path, values, *, dtype=np.uint8):
    """Write a small scan that contains the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.zeros((4, 4, 4), dtype=dtype)
    voxels.flat[: len(values)] = values
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


@pytest.fixture
def data(tmp_path):
    """Nine training, two validation and one unlabelled case in MSD form; validation case 0 has no left kidney."""
    folder = tmp_path / "data"
    content = {
        "labels": LABELS,
        "modality": {"0": "CT"},
        "training": [],
        "validation": [],
        "unlabelled": ["more.nii.gz"],
    }
    for section, number in (("training", 9), ("validation", 2)):
        for i in range(number):
            case = {"image": f"images/{section}{i}.nii.gz", "label": f"labels/{section}{i}.nii.gz"}
            write_scan(folder / case["image"], [100, -50], dtype=np.int16)
            write_scan(folder / case["label"], [1] if (section, i) == ("validation", 0) else [1, 2])
            content[section].append(case)
    write_scan(folder / "more.nii.gz", [1], dtype=np.int16)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def made(data, out, **changes):
    prepare_folder(out, "made_up")
    return planner_of(check_study({**CONTENT, **changes}, source="made_up.yaml"), data=data, out=out)


def test_labels_that_a_file_does_not_hold_are_named(tmp_path):
    contained = {"both": [1, 2], "one": [2], "none": [0], "other": [1, 2, 9]}
    for name, values in contained.items():
        write_scan(tmp_path / f"{name}.nii.gz", values, dtype=np.float32 if name == "one" else np.uint8)
    cases = {name: {"label": str(tmp_path / f"{name}.nii.gz")} for name in contained}
    assert absent_labels(cases, labels=LABELS) == {"one": ["liver"], "none": ["liver", "left kidney"]}


def test_a_label_file_is_read_once_unless_its_size_changes(tmp_path):
    path, remember = tmp_path / "a.nii.gz", tmp_path / "present.json"
    write_scan(path, [1])
    cases = {"a": {"label": str(path)}}
    assert absent_labels(cases, labels=LABELS, remember=remember) == {"a": ["left kidney"]}
    path.write_bytes(b"x" * path.stat().st_size)  # unreadable, but not read
    assert absent_labels(cases, labels=LABELS, remember=remember) == {"a": ["left kidney"]}
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read"):
        absent_labels(cases, labels=LABELS, remember=remember)


def test_a_label_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "torn.nii.gz").write_bytes(b"no scan")
    with pytest.raises(InputError, match="torn.nii.gz cannot be read"):
        absent_labels({"a": {"label": str(tmp_path / "torn.nii.gz")}}, labels=LABELS)


def test_the_outline_of_a_data_set_names_what_its_scored_cases_lack(data, tmp_path):
    assert made(data, tmp_path / "out").outline()["absent"] == {"validation0": ["left kidney"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(labels={"0": "background", "1": "liver"}), "declares labels .*made_up has"),
        (lambda content: content.update(modality={"0": "CT", "1": "PET"}), "declares 2 channels"),
        (lambda content: content.update(modality={"0": "T2"}), "declares the channels .*T2.*made_up has .*CT"),
        (
            lambda content: content.update(labels={"0": "background", "1": "Anterior", "2": "Posterior"}),
            "those of Task04_Hippocampus; made_up has",
        ),
    ],
)
def test_labels_and_channels_of_the_list_must_be_those_of_the_row(data, tmp_path, change, words):
    rewrite(data, change)
    with pytest.raises(InputError, match=f"dataset.json.*{words}"):
        made(data, tmp_path / "out")


def test_a_row_that_is_chosen_by_name_is_compared_too(data, tmp_path):
    with pytest.raises(InputError, match="dataset.json declares labels .*Task09_Spleen has"):
        made(data, tmp_path / "out", row=None, task="Task09_Spleen")


def test_a_list_by_its_own_path_is_compared(data, tmp_path):
    shutil.move(data / "dataset.json", data / "own.json")
    assert len(made(data / "own.json", tmp_path / "one").parts.validation) == 2
    content = json.loads((data / "own.json").read_text()) | {"labels": {"0": "background", "1": "liver"}}
    (data / "own.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="own.json declares labels"):
        made(data / "own.json", tmp_path / "two")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({key: value for key, value in ROW.items() if key != "spacing"}, "made_up.yaml, row: made_up lacks spacing"),
        ({**ROW, "modality": "PET"}, "made_up.yaml, row: made_up has modality 'PET'"),
        ({**ROW, "labels": {"0": "background", "1": "liver"}}, "dataset.json declares labels"),
    ],
)
def test_a_refused_row_leaves_the_folder_to_the_corrected_one(data, tmp_path, wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        made(data, tmp_path / "out", row=wrong)
    assert "task.yaml" not in str(caught.value)
    assert made(data, tmp_path / "out").row["spacing"] == ROW["spacing"]


def test_a_row_may_be_changed_until_something_was_run_by_it(data, tmp_path):
    made(data, tmp_path / "out")
    other = {**ROW, "nsd_tolerance": 2.0}
    assert made(data, tmp_path / "out", row=other).row["nsd_tolerance"] == 2.0
    assert yaml.safe_load((tmp_path / "out/task.yaml").read_text()) == {"made_up": other}
    (tmp_path / "out/runs/finetune_scratch_n2_seed0").mkdir(parents=True)
    made(data, tmp_path / "out", row=other)
    with pytest.raises(
        InputError, match="made_up.yaml: row is not the one that .*finetune_scratch_n2_seed0 was made with"
    ):
        made(data, tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out/task.yaml").read_text()) == {"made_up": other}


def test_data_that_were_refused_do_not_hold_the_folder(data, tmp_path):
    shutil.copytree(data, tmp_path / "wrong")
    rewrite(tmp_path / "wrong", lambda content: content.update(modality={"0": "T2"}))
    other_scan(tmp_path / "wrong")
    with pytest.raises(InputError, match="declares the channels"):
        made(tmp_path / "wrong", tmp_path / "out")
    made(data, tmp_path / "out")


def test_a_row_that_cannot_be_proposed_names_the_list_of_the_user(data, tmp_path):
    rewrite(data, lambda content: content.pop("modality"))
    with pytest.raises(InputError) as caught:
        made(data, tmp_path / "out", row=None)
    assert str(data / "dataset.json") in str(caught.value) and "proposal.json" not in str(caught.value)


def test_the_same_data_elsewhere_are_the_same(data, tmp_path):
    made(data, tmp_path / "out")
    shutil.copytree(data, tmp_path / "moved")
    made(tmp_path / "moved", tmp_path / "out", tuning=2)  # a choice of the study
    assert str(tmp_path) not in (tmp_path / "out/.data.json").read_text()


def swap_validation(data):
    rewrite(data, lambda content: content["validation"].append(content["training"].pop()))


def drop_unlabelled(data):
    rewrite(data, lambda content: content.pop("unlabelled"))


def other_scan(data):
    write_scan(data / "images/training3.nii.gz", list(range(60)), dtype=np.int16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_validation, "1 training cases differ; training8 is gone"),
        (drop_unlabelled, "1 unlabelled cases differ; more is gone"),
        (other_scan, "1 training cases differ; training3 has files of other sizes"),
    ],
)
def test_other_data_in_a_folder_are_refused_with_what_to_do(data, tmp_path, change, words):
    made(data, tmp_path / "out")
    change(data)
    with pytest.raises(InputError, match=f"out was made with other data than .*{words}.*Pass another --out"):
        made(data, tmp_path / "out")


def test_a_stale_row_is_not_used_for_other_data(data, tmp_path):
    """Without a row in the study, one is proposed and kept in OUT: it belongs to the data it was proposed for."""
    content = {"row": None, "task": None}
    made(data, tmp_path / "out", **content)
    assert (tmp_path / "out/task.yaml").exists()
    other_scan(data)
    with pytest.raises(InputError, match="task row and finished runs belong to the other data"):
        made(data, tmp_path / "out", **content)


def test_a_folder_of_an_earlier_version_gets_its_fingerprint(data, tmp_path):
    made(data, tmp_path / "out")
    before = (tmp_path / "out/.data.json").read_text()
    Path(tmp_path / "out/.data.json").unlink()
    made(data, tmp_path / "out")
    assert (tmp_path / "out/.data.json").read_text() == before


def test_no_scored_image_reaches_a_pretraining(data, tmp_path):
    rewrite(data, lambda content: content["unlabelled"].append("images/training2.nii.gz"))
    planner = made(data, tmp_path / "out")
    run = next(run for run in planner.curve() if run.kind == "pretraining")
    images = [case["image"] for case in run.lists["pretraining"]["training"]]
    assert len(images) == len(set(images)) == 9 - 3 + 1 and not any("validation" in image for image in images)
    rewrite(data, lambda content: content["unlabelled"].append("images/validation1.nii.gz"))
    with pytest.raises(InputError, match="validation1.nii.gz is in the unlabelled and in the validation"):
        made(data, tmp_path / "new")


@pytest.mark.parametrize("row", [CONTENT["row"], None])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(labels=5), "dataset.json.* .?labels.? .*5"),
        (lambda content: content.update(modality=5), "declares .?modality.? 5"),
        (lambda content: content.update(modality="CT"), "declares .?modality.? 'CT'"),
        (lambda content: content["unlabelled"].append("gone.nii.gz"), "1 unlabelled images do not exist.*gone.nii.gz"),
    ],
)
def test_a_data_list_that_cannot_be_read_is_named(data, tmp_path, change, words, row):
    rewrite(data, change)
    with pytest.raises(InputError, match=words):
        made(data, tmp_path / "out", row=row)


@pytest.mark.parametrize("value", [np.nan, 1.5])
def test_a_label_file_of_values_that_are_no_labels_is_named(tmp_path, value):
    write_scan(tmp_path / "a.nii.gz", [1, value], dtype=np.float32)
    with pytest.raises(InputError, match=f"a.nii.gz contains {value}, but labels must be whole numbers"):
        absent_labels({"a": {"label": str(tmp_path / "a.nii.gz")}}, labels=LABELS)


@pytest.mark.parametrize("inside", ["", "sub/folder"])
def test_a_file_is_no_folder_for_a_study(tmp_path, inside):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="taken is a file. Pass another --out"):
        prepare_folder(tmp_path / "taken" / inside, "made_up")


@pytest.mark.parametrize("name", [".data.json", ".present_labels.json"])
def test_a_torn_file_of_the_folder_is_named(data, tmp_path, name):
    made(data, tmp_path / "out")
    (tmp_path / "out" / name).write_text("")
    with pytest.raises(InputError, match=f"{name} is not valid JSON .*0 bytes.*Remove it"):
        made(data, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    made(data, tmp_path / "out")


@pytest.mark.parametrize("labels", [LABELS, {"0": "background", "1": "liver", "2": "spleen"}])
def test_the_row_of_synthetic_patients_is_used_for_data_with_its_labels_or_said_not_to_be(
    data, tmp_path, labels, capsys
):
    row = {**CONTENT["row"], "hu_window": [-10.0, 10.0], "labels": labels}
    out = tmp_path / "out"
    planner = made(data, out, row=row, synthetic={"training": 4})
    printed = capsys.readouterr().out
    if labels == LABELS:
        assert planner.row["hu_window"] == [-10.0, 10.0] and printed == ""
    else:
        assert planner.row["hu_window"] != [-10.0, 10.0] and planner.row["labels"] == LABELS
        assert (
            printed.startswith("made_up.yaml: row is not used: its labels are")
            and f"instead: {out / 'task.yaml'}" in printed
        )


def test_a_task_of_synthetic_patients_is_said_not_to_be_used(data, tmp_path, capsys):
    planner = made(data, tmp_path / "out", row=None, task="Task09_Spleen", synthetic={"training": 4})
    assert planner.row["labels"] == LABELS
    assert "made_up.yaml: task is not used: its labels are" in capsys.readouterr().out
