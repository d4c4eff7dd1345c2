# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The plan of a cross-validation has a run for each task, arm and fold, and refuses what cannot be."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from bundles.common.errors import InputError
from tools.bundle_runs import read_plan
from workflow.fold_plan import files_of, plan_folds
from workflow.folds import check_folds, read_folds

from ..workflows.miniature_decathlon import write_miniature

EXAMPLES = Path(__file__).parents[2] / "workflow/examples"
SPLEEN, HIPPOCAMPUS = "Task09_Spleen", "Task04_Hippocampus"
TWO = {"name": "mini", "folds": 2, "preset": "cpu", "training": {"max_steps": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Miniature versions of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    for task in (SPLEEN, HIPPOCAMPUS):
        write_miniature(folder, task)
    return folder


def planned(tmp_path, data, **changes):
    file = tmp_path / "folds.yaml"
    file.write_text(yaml.safe_dump({**TWO, **changes}))
    plan_folds(file, data=data, out=tmp_path / "out")
    return read_plan(tmp_path / "out")


def options(plan, run, command="train"):
    words = next(each["words"] for each in plan["runs"][run]["commands"] if each["name"] == command)
    return dict(zip(words[5::2], words[6::2], strict=True))


def test_every_task_arm_and_fold_has_a_run_and_mr_is_not_trained_from_an_encoder_of_ct(tmp_path, data):
    (tmp_path / "encoder.pt").touch()
    arms = {"scratch": {}, "pretrained": {"encoder": str(tmp_path / "encoder.pt"), "modalities": ["CT"]}}
    plan = planned(tmp_path, data, arms=arms, ensemble=["pretrained", "scratch"], submission=True)
    folds = [f"{SPLEEN}_{arm}_fold{fold}" for arm in arms for fold in (0, 1)]
    folds += [f"{HIPPOCAMPUS}_scratch_fold{fold}" for fold in (0, 1)]
    assert sorted(plan["ends"]["finetuning"]) == sorted(folds)
    assert sorted(plan["ends"]["inference"]) == [f"{HIPPOCAMPUS}_scratch_ensemble", f"{SPLEEN}_pretrained_ensemble"]
    assert set(plan["runs"]) == {*folds, *plan["ends"]["inference"], "table", "submission"}

    train = options(plan, f"{SPLEEN}_pretrained_fold1")
    assert train["--fold"] == "1" and train["--folds"] == "2" and train["--task"] == SPLEEN
    assert train["--pretrained_encoder"] == str(tmp_path / "encoder.pt") and train["--max_steps"] == "2"
    assert "--pretrained_encoder" not in options(plan, f"{SPLEEN}_scratch_fold1")
    ensemble = options(plan, f"{SPLEEN}_pretrained_ensemble", "infer")
    assert ensemble["--pretrained_model"] == f"{{out}}/runs/{SPLEEN}_pretrained_fold*/train/models/model.pt"
    assert plan["runs"][f"{SPLEEN}_pretrained_ensemble"]["needs"] == [f"{SPLEEN}_pretrained_fold{i}" for i in (0, 1)]
    submit = json.loads((tmp_path / "out/runs/submission/lists/submit.json").read_text())
    assert submit["tasks"][HIPPOCAMPUS] == str(tmp_path / f"out/runs/{HIPPOCAMPUS}_scratch_ensemble/masks")


def test_the_folds_of_an_own_pretraining_wait_for_it(tmp_path, data):
    own = {"scans": str(data), "prepare": {"min_slices": 4}, "options": {"max_steps": 7}}
    arms = {"pretrained": {"encoder": "pretraining"}}
    plan = planned(tmp_path, data, tasks=[SPLEEN], arms=arms, pretraining=own)
    assert plan["runs"]["pretrain"]["needs"] == ["prepare"]
    assert plan["runs"][f"{SPLEEN}_pretrained_fold0"]["needs"] == ["pretrain"]
    train = options(plan, "pretrain")
    assert train["--data"] == "store" and train["--dataset_dir"] == "{out}/runs/prepare/data"
    assert train["--max_steps"] == "7" and options(plan, "prepare", "prepare")["--source"] == str(data)
    assert options(plan, "prepare", "prepare")["--spacing"] == "[4.0, 4.0, 5.0]"  # of the preset cpu
    (tmp_path / "raw").mkdir()
    raw = planned(tmp_path / "raw", data, tasks=[SPLEEN], arms=arms, pretraining={"scans": [str(data), "/"]})
    assert raw["runs"]["pretrain"]["needs"] == [] and options(raw, "pretrain")["--dataset_dir"] == json.dumps(
        [str(data), "/"]
    )


def test_ones_own_data_get_a_row_once(tmp_path, data):
    plan = planned(tmp_path, data / SPLEEN, task="own")
    row = (tmp_path / "out/task.yaml").read_text()
    assert set(plan["runs"]) == {"mini_scratch_fold0", "mini_scratch_fold1", "table"}
    assert options(plan, "mini_scratch_fold0")["--task"] == "{out}/task.yaml"
    planned(tmp_path, data / SPLEEN, task="own")
    assert (tmp_path / "out/task.yaml").read_text() == row


def test_other_data_or_another_encoder_than_those_of_a_begun_workflow_are_refused(tmp_path, data):
    encoder = tmp_path / "encoder.pt"
    encoder.write_bytes(b"one")
    arms = {"ours": {"encoder": str(encoder)}}
    plan = planned(tmp_path, data, tasks=[SPLEEN], arms=arms)
    run = tmp_path / f"out/runs/{SPLEEN}_ours_fold0"
    (run / "settings.json").parent.mkdir(parents=True, exist_ok=True)
    (run / "settings.json").write_text(json.dumps(plan["runs"][run.name]["settings"]))
    planned(tmp_path, data, tasks=[SPLEEN], arms=arms)
    encoder.write_bytes(b"two")
    with pytest.raises(InputError, match="facts.encoder was"):
        planned(tmp_path, data, tasks=[SPLEEN], arms=arms)
    encoder.write_bytes(b"one")
    other = tmp_path / "other" / SPLEEN
    shutil.copytree(data / SPLEEN, other)
    planned(tmp_path, other.parent, tasks=[SPLEEN], arms=arms)  # the same data elsewhere
    content = json.loads((other / "dataset.json").read_text())
    content["training"].pop()
    (other / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="made with other data of Task09_Spleen: 2 training files differ; .* is gone"):
        planned(tmp_path, other.parent, tasks=[SPLEEN], arms=arms)


def test_an_ensemble_without_anything_to_segment_is_said(tmp_path, data, capsys):
    bare = tmp_path / "bare" / SPLEEN
    shutil.copytree(data / SPLEEN, bare)
    content = json.loads((bare / "dataset.json").read_text())
    (bare / "dataset.json").write_text(json.dumps({**content, "test": []}))
    plan = planned(tmp_path, bare.parent, ensemble=["scratch"])
    assert plan["ends"]["inference"] == [] and "No masks of an ensemble for Task09_Spleen" in capsys.readouterr().out


def test_scans_that_were_added_are_segmented(tmp_path, data, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.nii.gz").touch()
    asked = {"tasks": [SPLEEN], "ensemble": ["scratch"], "scans": str(scans)}
    (run,) = planned(tmp_path, data, **asked)["ends"]["inference"]
    mark = tmp_path / "out/runs" / run / ".infer.done"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    os.utime(mark, (time.time() + 60,) * 2)
    planned(tmp_path, data, **asked)
    assert mark.exists()
    os.utime(mark, (time.time() - 60,) * 2)
    (scans / "deeper").mkdir()
    shutil.copy2(scans / "a.nii.gz", scans / "deeper/b.nii.gz")
    capsys.readouterr()
    planned(tmp_path, data, **asked)
    assert not mark.exists() and f"{run}: {scans} has new files" in capsys.readouterr().out


def test_scans_that_were_added_in_a_linked_folder_are_segmented(tmp_path, data):
    scans, disk = tmp_path / "scans", tmp_path / "disk"
    for folder in (scans, disk):
        folder.mkdir()
    (scans / "linked").symlink_to(disk)
    (disk / "back").symlink_to(scans)
    (disk / "deeper").mkdir()
    asked = {"tasks": [SPLEEN], "ensemble": ["scratch"], "scans": str(scans)}
    (run,) = planned(tmp_path, data, **asked)["ends"]["inference"]
    mark = tmp_path / "out/runs" / run / ".infer.done"
    mark.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(0.05)
    mark.touch()
    planned(tmp_path, data, **asked)
    assert mark.exists()
    time.sleep(0.05)
    (disk / "deeper/b.nii.gz").touch()
    planned(tmp_path, data, **asked)
    assert not mark.exists()


def test_patients_that_differ_by_their_folder_alone_are_told_apart(tmp_path):
    for patient in ("p0", "p1"):
        for kind in ("images", "labels"):
            (tmp_path / patient / kind).mkdir(parents=True)
            (tmp_path / patient / kind / "ct.nii.gz").write_bytes(b"x" * (1 + int(patient[1])))
    entries = [{"image": f"p{n}/images/ct.nii.gz", "label": f"p{n}/labels/ct.nii.gz"} for n in range(2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    found = files_of(tmp_path)["training"]
    assert found == {f"p{n}/{kind}/ct.nii.gz": 1 + n for n in range(2) for kind in ("images", "labels")}


def test_what_is_known_of_the_data_of_other_tasks_stays(tmp_path, data):
    planned(tmp_path, data, tasks=[SPLEEN, HIPPOCAMPUS])
    planned(tmp_path, data, tasks=[HIPPOCAMPUS])
    assert set(json.loads((tmp_path / "out/.data.json").read_text())) == {SPLEEN, HIPPOCAMPUS}


def test_paths_may_begin_with_the_home_folder_and_a_row_may_be_called_yml(tmp_path, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "encoder.pt").touch()
    row = yaml.safe_load((EXAMPLES.parents[1] / "bundles/swin_unetr_msd/configs/tasks.yaml").read_text())[SPLEEN]
    (tmp_path / "row.yml").write_text(yaml.safe_dump({SPLEEN: row}))
    arms = {"pretrained": {"encoder": "~/encoder.pt"}}
    plan = planned(tmp_path, data / SPLEEN, arms=arms, task=str(tmp_path / "row.yml"))
    assert options(plan, "row_pretrained_fold0")["--task"] == str(tmp_path / "row.yml")


def test_the_examples_are_read(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: True)  # the folders that they name
    assert read_folds(EXAMPLES / "cross_validation.yaml").ensemble == ["scratch"]
    assert read_folds(EXAMPLES / "decathlon.yaml").arms["pretrained"].modalities == ["CT"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": 3}, "fold is not a key of a cross-validation. Did you mean folds"),
        ({"folds": "five"}, "folds 'five' must be"),
        ({"folds": 1}, "folds 1 must be"),
        ({"arms": {"scratch": {"encodr": "a"}}}, "encodr is not a key of an arm. Did you mean encoder"),
        ({"arms": {}}, "arms"),
        ({"preset": "gpu"}, "preset 'gpu' must be"),
        ({"training": {"fold": 1}}, "training.fold is set by the plan"),
        ({"task": SPLEEN, "tasks": [SPLEEN]}, "both task and tasks"),
        ({"tasks": [SPLEEN, SPLEEN]}, "tasks .* contains a value twice"),
        ({"arms": {"a": {"encoder": "pretraining"}}}, "no entry pretraining"),
        ({"arms": {"a": {"encoder": "/nowhere/encoder.pt"}}}, "encoder /nowhere/encoder.pt does not exist"),
        ({"ensemble": ["b"]}, "ensemble 'b' is not an arm. Allowed are scratch"),
        ({"submission": True}, "submission needs an ensemble"),
        ({"submission": True, "ensemble": ["scratch"], "scans": "/"}, "Remove scans"),
        ({"scans": "/nowhere/ct"}, "scans /nowhere/ct does not exist"),
        ({"pretraining": {"scans": ["/", "/nowhere/ct"]}}, "pretraining.scans /nowhere/ct does not exist"),
        ({"submission": True, "ensemble": ["scratch"], "task": "own"}, "tasks of the Decathlon. Remove it"),
    ],
)
def test_wrong_entries_are_named_with_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=f"folds.yaml: .*{message}"):
        check_folds({**TWO, **changes}, source="folds.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "a: ["])
def test_a_file_that_is_no_list_of_entries_is_named(tmp_path, text):
    (tmp_path / "folds.yaml").write_text(text)
    with pytest.raises(InputError, match=r"folds\.yaml"):
        read_folds(tmp_path / "folds.yaml")


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"tasks": ["Task9_Spleen"]}, "", "Task9_Spleen is not a task of the Decathlon. Did you mean Task09_Spleen"),
        ({"tasks": ["Task03_Liver"]}, "", "Task03_Liver has no dataset.json"),
        ({}, SPLEEN, "has no folder of a task"),
        ({}, "nowhere", "is not a folder"),
        ({"task": "Task03_Liver"}, SPLEEN, "Task03_Liver|liver"),
        ({"task": "Task9_Spleen"}, SPLEEN, "Did you mean Task09_Spleen.*say own"),
        ({"task": SPLEEN}, "", "has no dataset.json. Pass .*Task0"),
        (
            {"training": {"max_step": 3}},
            "",
            "folds.yaml: max_step, which .* is not an option .* Did you mean max_steps",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_planned(tmp_path, data, changes, where, message):
    with pytest.raises(InputError, match=message):
        planned(tmp_path, data / where, **changes)
    assert not (tmp_path / "out/plan.json").exists()


def test_no_data_and_a_folder_of_something_else_are_named(tmp_path, data):
    with pytest.raises(InputError, match="data is missing"):
        planned(tmp_path, None)
    planned(tmp_path, data)
    with pytest.raises(InputError, match="contains the cross-validation mini, not other"):
        planned(tmp_path, data, name="other")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").touch()
    file = tmp_path / "folds.yaml"
    with pytest.raises(InputError, match="files that no cross-validation made"):
        plan_folds(file, data=data, out=tmp_path / "b")
