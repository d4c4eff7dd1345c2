# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Rows of the Decathlon's tasks are found by name, file or model, checked, and compared with the data."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml

from bundles.common.errors import InputError
from bundles.common.run.options import NOT_SETTINGS, option_names
from bundles.segmentation.tasks.tasks import check_dataset, choose_task, dataset_folder, kept_row, task_values

CONFIGS = Path(__file__).parents[3] / "bundles" / "swin_unetr_msd" / "configs"
BTCV = Path(__file__).parents[3] / "bundles" / "swin_unetr_btcv_seg" / "configs"
TABLE, PRESETS = str(CONFIGS / "tasks.yaml"), str(CONFIGS / "presets.yaml")
# Training cases, test cases, channels and classes, from the Decathlon's own dataset.json files (Antonelli et al.,
# Nature Communications 2022).
DECATHLON = {
    "Task01_BrainTumour": (484, 266, 4, 4),
    "Task02_Heart": (20, 10, 1, 2),
    "Task03_Liver": (131, 70, 1, 3),
    "Task04_Hippocampus": (260, 130, 1, 3),
    "Task05_Prostate": (32, 16, 2, 3),
    "Task06_Lung": (63, 32, 1, 2),
    "Task07_Pancreas": (281, 139, 1, 3),
    "Task08_HepaticVessel": (303, 140, 1, 3),
    "Task09_Spleen": (41, 20, 1, 2),
    "Task10_Colon": (126, 64, 1, 2),
}
PRESET_NAMES = ("official", "few_label", "whole_network", "cpu")
# Channels and structures as named in the Decathlon's own dataset.json files, where they differ from the table.
WORDS = {
    "Task01_BrainTumour": (
        ("FLAIR", "T1w", "t1gd", "T2w"),
        ("edema", "non-enhancing tumor", "enhancing tumour"),
    ),
    "Task02_Heart": (("MRI",), ("left atrium",)),
    "Task04_Hippocampus": (("MRI",), ("Anterior", "Posterior")),
    "Task05_Prostate": (("T2", "ADC"), ("PZ", "TZ")),
    "Task08_HepaticVessel": (("CT",), ("Vessel", "Tumour")),
    "Task10_Colon": (("CT",), ("colon cancer primaries",)),
}


def choose(task=None, preset="official", **others):
    return choose_task(task=task, file=TABLE, preset=preset, **others)


def write_row(path: Path, name="Own", **changes) -> str:
    row = {
        "modality": "CT",
        "channels": ["CT"],
        "labels": {"0": "background", "1": "kidney"},
        "spacing": [2.0, 2.0, 2.0],
        "roi_size": [96, 96, 96],
        "hu_window": [-100.0, 300.0],
        "foreground": -100.0,
        "nsd_tolerance": 2.0,
        **changes,
    }
    path.write_text(yaml.safe_dump({name: {key: value for key, value in row.items() if value is not ...}}))
    return str(path)


@pytest.mark.parametrize("task", DECATHLON)
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_each_row_is_the_decathlons_and_complete(task, preset):
    row = choose(task, preset)
    training, test, channels, classes = DECATHLON[task]
    assert row["cases"] == {"training": training, "test": test}
    assert len(row["channels"]) == channels and len(row["labels"]) == classes
    assert row["name"] == task
    assert (row["hu_window"] is None) == (row["modality"] == "MR")
    assert row["foreground"] == (row["hu_window"][0] if row["hu_window"] else 0.0)


def test_the_table_has_ten_tasks():
    assert list(yaml.safe_load(Path(TABLE).read_text())) == list(DECATHLON)


@pytest.mark.parametrize("task", DECATHLON)
def test_steps_of_the_full_recipe_go_by_the_number_of_cases(task):
    values = task_values(preset="official", file=PRESETS, row=choose(task))
    assert values["max_steps"] == min(60000, 5000 * round(DECATHLON[task][0] ** 0.5))


@pytest.mark.parametrize("task", DECATHLON)
def test_a_step_of_the_full_recipe_has_about_as_many_voxels_as_that_of_btcv(task):
    row = choose(task)
    values = task_values(preset="official", file=PRESETS, row=row)
    x, y, z = row["roi_size"]
    voxels = x * y * z * values["crops_per_volume"] * values["batch_size"]
    assert 0.85 < voxels / (4 * 96**3) < 1.35


def test_a_row_changes_values_of_one_preset_alone():
    hippocampus = "Task04_Hippocampus"
    official, few, whole, cpu = (
        task_values(preset=preset, file=PRESETS, row=choose(hippocampus, preset)) for preset in PRESET_NAMES
    )
    assert (official["batch_size"], official["crops_per_volume"]) == (12, 1)
    assert (whole["batch_size"], whole["learning_rate"], whole["max_steps"]) == (1, 3e-5, 60000)
    assert (few["batch_size"], few["max_steps"]) == (1, 20000)
    assert (cpu["batch_size"], cpu["max_steps"], cpu["feature_size"]) == (4, 2400, 12)
    assert choose(hippocampus, "cpu")["roi_size"] == [32, 64, 32]
    assert choose(hippocampus, "few_label")["roi_size"] == [64, 64, 64]


def test_a_misspelt_task_offers_the_nearest():
    with pytest.raises(InputError, match="Did you mean Task08_HepaticVessel.*dataset.json"):
        choose("Task08_HepaticVessels")


def test_a_file_with_one_row_is_a_task(tmp_path):
    row = choose(write_row(tmp_path / "task.yaml", cpu={"spacing": [4.0, 4.0, 4.0], "max_steps": 7}), "cpu")
    assert (row["name"], row["spacing"], row["hu_window"]) == ("Own", [4.0, 4.0, 4.0], [-100.0, 300.0])
    assert task_values(preset="cpu", file=PRESETS, row=row)["max_steps"] == 7


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spacing": ...}, "Own lacks spacing"),
        ({"spacings": [1, 1, 1]}, "sets 'spacings'.*Did you mean spacing"),
        ({"cpu": {"maxsteps": 3}}, "Own, cpu sets 'maxsteps'.*Did you mean max_steps"),
        ({"cpu": 3}, "Own, cpu must contain entries"),
        ({"channels": "CT"}, "channels 'CT'"),
        ({"modality": "PET"}, "modality 'PET'"),
        ({"labels": {"0": "background", "2": "kidney"}}, "without a gap"),
        ({"labels": ["background", "kidney"]}, "a name for each value"),
        ({"foreground": None}, "foreground None; expected a number"),
        ({"cpu": {"foreground": "air"}}, "Own, cpu has foreground 'air'"),
        ({"nsd_tolerance": {"kidney": -1}}, "nsd_tolerance .*-1.*expected mm"),
    ],
)
def test_a_faulty_row_is_refused_with_its_file(tmp_path, changes, says):
    file = write_row(tmp_path / "task.yaml", **changes)
    with pytest.raises(InputError, match=f"task.yaml: .*{says}"):
        choose(file)


def test_a_file_must_hold_one_row(tmp_path):
    (tmp_path / "two.yaml").write_text("A: {}\nB: {}\n")
    with pytest.raises(InputError, match="two.yaml must contain exactly one row"):
        choose(str(tmp_path / "two.yaml"))
    with pytest.raises(InputError, match="none.yaml not found.*--task FOLDER proposes a row"):
        choose(str(tmp_path / "none.yaml"))


def test_a_file_that_is_no_yaml_is_refused_by_its_name_and_line(tmp_path):
    (tmp_path / "task.yaml").write_text("Own:\n  spacing: [1, 2\n  modality: CT\n")
    with pytest.raises(InputError, match=r"(?s)task.yaml is not valid YAML: .*line 2"):
        choose(str(tmp_path / "task.yaml"))


def test_labels_and_names_that_yaml_takes_for_numbers_are_text(tmp_path):
    row = choose(write_row(tmp_path / "task.yaml", name=2024, labels={1: "kidney", 0: "background"}))
    assert (row["name"], list(row["labels"].items())) == ("2024", [("0", "background"), ("1", "kidney")])


def model_file(path: Path, **content) -> str:
    torch.save({"model": {}, **content}, path)
    return str(path)


def test_a_model_brings_the_row_that_it_was_trained_by(tmp_path):
    row = choose(write_row(tmp_path / "task.yaml"))
    kept = kept_row(row=row, spacing=[3.0, 3.0, 3.0], roi_size=[64, 64, 64])
    model = model_file(tmp_path / "model.pt", task="Own", row=kept)
    found = choose(None, checkpoint=model)
    assert found == {**row, "spacing": [3.0, 3.0, 3.0], "roi_size": [64, 64, 64]}
    assert choose(str(tmp_path / "task.yaml"), checkpoint=model) == found
    assert choose("Own", checkpoint=model) == found
    assert choose("/data/own/dataset.json", checkpoint=model) == found  # no new row is proposed
    with pytest.raises(InputError, match="model.pt was trained for Own, not for --task Task09_Spleen"):
        choose("Task09_Spleen", checkpoint=model)


def test_what_a_file_says_otherwise_than_the_model_is_not_passed_over_in_silence(tmp_path, caplog):
    file = write_row(tmp_path / "task.yaml", cpu={"spacing": [4.0, 4.0, 4.0]})
    model = model_file(tmp_path / "model.pt", task="Own", row=kept_row(row=choose(file, "cpu")))
    assert choose(file, checkpoint=model)["spacing"] == [4.0, 4.0, 4.0]  # another preset's value is no difference
    assert not caplog.records
    write_row(tmp_path / "task.yaml", cpu={"spacing": [4.0, 4.0, 4.0]}, nsd_tolerance=5.0)
    assert choose(file, checkpoint=model)["nsd_tolerance"] == 2.0
    assert "was trained with nsd_tolerance 2.0, which is used" in caplog.text and "task.yaml has 5.0" in caplog.text
    assert len(caplog.records) == 1


def test_a_model_that_says_its_task_alone_takes_the_row_of_the_table(tmp_path):
    model = model_file(tmp_path / "model.pt", task="Task03_Liver")
    assert choose(None, checkpoint=model) == choose("Task03_Liver")


def test_without_a_task_the_only_one_of_the_table_is_taken_and_several_are_named(tmp_path):
    with pytest.raises(InputError, match="--task is missing: .*Task01_BrainTumour, .*Task10_Colon.*--task NAME"):
        choose(None, checkpoint=str(tmp_path / "none.pt"))
    btcv = str(BTCV / "tasks.yaml")
    row = choose_task(task=None, file=btcv, preset="cpu")
    assert (row["name"], row["spacing"], row["roi_size"]) == ("BTCV", [4.0, 4.0, 5.0], [64, 64, 32])
    metadata = json.loads((BTCV / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert row["labels"] == metadata["channel_def"]  # where the Model Zoo and MONAI Label look for them


def test_a_model_that_records_its_labels_alone_is_of_the_only_task_with_those_labels(tmp_path):
    model = model_file(tmp_path / "model.pt", labels={"0": "background", "1": "tumour"})
    row = choose_task(task=None, file=str(BTCV / "tasks.yaml"), preset="official", checkpoint=model)
    assert (row["name"], row["labels"]) == ("BTCV", {"0": "background", "1": "tumour"})


def test_the_data_lie_beside_a_list_that_is_the_task():
    assert dataset_folder(task="/data/own/dataset.json", otherwise="./data") == "/data/own"
    assert dataset_folder(task="Task09_Spleen", otherwise="./data") == "./data"


def test_a_folder_is_own_data_unless_the_table_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "Task09_Spleen").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert dataset_folder(task="mine", otherwise="./data", file=TABLE) == "mine"
    assert dataset_folder(task="Task09_Spleen", otherwise="./data", file=TABLE) == "./data"
    assert dataset_folder(task="./Task09_Spleen", otherwise="./data", file=TABLE) == "./Task09_Spleen"
    assert choose("Task09_Spleen")["labels"] == {"0": "background", "1": "spleen"}
    with pytest.raises(InputError, match="mine/dataset.json not found"):
        choose("mine")


def test_a_list_of_another_name_is_the_data_and_not_the_dataset_json_beside_it(tmp_path):
    write_list(tmp_path)
    content = {"labels": {"0": "background", "1": "kidney"}, "modality": {"0": "CT"}, "test": ["a.nii.gz"]}
    (tmp_path / "kidneys.json").write_text(json.dumps(content))
    row = choose(write_row(tmp_path / "task.yaml"))
    folder = dataset_folder(task=str(tmp_path / "kidneys.json"), otherwise="./data")
    check_dataset(dataset_dir=folder, data_list=None, row=row, file=TABLE)
    with pytest.raises(InputError, match="those of Task09_Spleen; Own has"):
        check_dataset(dataset_dir=str(tmp_path), data_list=None, row=row, file=TABLE)


def write_list(folder: Path, **changes) -> dict:
    content = {
        "labels": {"0": "background", "1": "spleen"},
        "modality": {"0": "CT"},
        "training": [{"image": "a.nii.gz", "label": "b.nii.gz"}] * 41,
        "test": ["c.nii.gz"] * 20,
    }
    (folder / "dataset.json").write_text(json.dumps(content | changes))
    return {"dataset_dir": str(folder), "data_list": None, "row": choose("Task09_Spleen")}


def test_values_that_nothing_explains_are_taken_for_those_of_the_task_and_it_is_said(tmp_path, caplog):
    for name in ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    row = choose("Task09_Spleen")
    check_dataset(dataset_dir=str(tmp_path), data_list=None, row=row, file=TABLE)
    assert f"{tmp_path} has no dataset.json" in caplog.text and f"Use --task {tmp_path}" in caplog.text
    assert "those of Task09_Spleen, 0: background, 1: spleen. Does it have other structures?" in caplog.text
    caplog.clear()
    own = row | {"labels": {"0": "background", "1": "label_1"}}  # what a folder's own row is called says so itself
    check_dataset(dataset_dir=str(tmp_path), data_list=None, row=own, file=TABLE)
    labels = {"0": "background", "1": "gallstone"}  # and --labels is what the warning asks for
    check_dataset(dataset_dir=str(tmp_path), data_list=None, row=own, labels=labels, file=TABLE)
    check_dataset(dataset_dir=str(tmp_path), data_list=None, row=row | {"name": "mine"}, labels=labels, file=TABLE)
    assert not [record for record in caplog.records if "no dataset.json" in record.message]


def test_the_decathlons_own_list_fits_its_row(tmp_path, caplog):
    check_dataset(**write_list(tmp_path))
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": {"0": "background", "1": "liver", "2": "cancer"}}, r"declares labels .*Task09_Spleen has .*spleen"),
        ({"labels": {"zero": "background"}}, "declares labels .*'zero'.*whole number with its name"),
        ({"modality": {"0": "T2", "1": "ADC"}}, r"declares 2 channels .*Task09_Spleen has 1"),
    ],
)
def test_a_list_that_contradicts_the_row_is_refused(tmp_path, changes, says):
    with pytest.raises(InputError, match=f"dataset.json {says}"):
        check_dataset(**write_list(tmp_path, **changes))


def words_of(task: str) -> dict:
    row = choose(task)
    structures = [name for value, name in row["labels"].items() if value != "0"]
    channels, structures = WORDS.get(task, (row["channels"], structures))
    return {
        "labels": {str(value): word for value, word in enumerate(("background", *structures))},
        "modality": {str(number): word for number, word in enumerate(channels)},
    }


@pytest.mark.parametrize("task", DECATHLON)
def test_the_folder_of_a_task_fits_its_row_alone(tmp_path, caplog, task):
    training, test, *_ = DECATHLON[task]
    cases = {"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}] * training, "test": ["c.nii.gz"] * test}
    write_list(tmp_path, **words_of(task), **cases)
    check_dataset(dataset_dir=str(tmp_path), data_list=None, row=choose(task), file=TABLE)
    assert not caplog.records
    for other in set(DECATHLON) - {task}:
        with pytest.raises(InputError, match=f"but {other} has|those of {task}; {other} has"):
            check_dataset(dataset_dir=str(tmp_path), data_list=None, row=choose(other), file=TABLE)


@pytest.mark.parametrize(
    ("modality", "says"),
    [
        ({"0": "T1w", "1": "FLAIR", "2": "t1gd", "3": "T2w"}, "T1w, FLAIR, t1gd, T2w"),
        ({"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "CT"}, "FLAIR, T1w, t1gd, CT"),
    ],
)
def test_channels_in_another_order_or_of_another_modality_are_refused(tmp_path, modality, says):
    write_list(tmp_path, **words_of("Task01_BrainTumour") | {"modality": modality})
    with pytest.raises(InputError, match=re.escape(f"declares the channels {says}, but Task01_BrainTumour has")):
        check_dataset(dataset_dir=str(tmp_path), data_list=None, row=choose("Task01_BrainTumour"), file=TABLE)


def test_other_makers_names_are_worth_a_warning(tmp_path, caplog):
    listed = write_list(tmp_path, labels={"0": "background", "1": "milt"})
    check_dataset(**listed, file=TABLE)
    assert "names its labels milt: they are used as spleen of Task09_Spleen" in caplog.text


@pytest.mark.parametrize("config", ["evaluate", "inference"])
def test_all_that_decides_the_voxels_is_kept_by_the_training_and_compared(config):
    train, later = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("train", config))
    expected = {key: value for key, value in later["expected"].items()}
    assert set(expected) == {"spacing", "hu_window", "roi_size", "foreground", "overlap"}
    facts = {"foreground": train["settings"]["facts"]["foreground"]}
    recorded = {key: f"@{key}" for key in option_names(train) if key not in NOT_SETTINGS} | facts
    assert {key: recorded[key] for key in expected} == expected


def save_model(folder, **content):
    torch.save({"model": {"w": torch.zeros(1)}, **content}, folder / "model.pt")
    return str(folder / "model.pt")


VOXELS = {"spacing": [3.0, 3.0, 4.0], "hu_window": [-100.0, 200.0], "roi_size": [64, 64, 64], "foreground": -99.0}


def test_a_model_without_a_row_gives_the_voxels_that_it_records(tmp_path, caplog):
    """Files of earlier versions, and of a bundle with a single task."""
    model = save_model(tmp_path, task="Task09_Spleen", trained=VOXELS)
    row = choose(None, checkpoint=model)
    assert {key: row[key] for key in VOXELS} == VOXELS and row["name"] == "Task09_Spleen" and not caplog.text


def test_a_model_that_records_no_voxels_falls_back_with_a_warning(tmp_path, caplog):
    model = save_model(tmp_path, task="Task09_Spleen", trained={"spacing": [3.0, 3.0, 4.0]})
    row = choose(None, checkpoint=model)
    assert row["spacing"] == [3.0, 3.0, 4.0] and row["roi_size"] == choose("Task09_Spleen")["roi_size"]
    assert "does not record its hu_window, roi_size, foreground: those of Task09_Spleen" in caplog.text


def test_the_overlap_of_the_training_comes_before_the_presets(tmp_path):
    row = choose("Task09_Spleen")
    model = save_model(tmp_path, trained={"overlap": 0.625, "max_steps": 3})
    assert task_values(preset="official", file=PRESETS, row=row, checkpoint=model)["overlap"] == 0.625
    absent = str(tmp_path / "absent.pt")
    values = task_values(preset="official", file=PRESETS, row=row)
    assert task_values(preset="official", file=PRESETS, row=row, checkpoint=absent) == values


def test_another_number_of_cases_is_worth_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check_dataset(**write_list(tmp_path, training=[{"image": "a.nii.gz", "label": "b.nii.gz"}] * 3))
    assert "3 cases under training, Task09_Spleen has 41" in caplog.text


def declare(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "training": ["a.nii.gz"]}))
    return {"dataset_dir": str(folder), "data_list": None, "row": OWN_ROW}


OWN_ROW = {
    "name": "Own",
    "labels": {"0": "background", "1": "spleen", "2": "right_kidney", "3": "liver"},
    "channels": ["CT"],
}


def test_a_list_that_agrees_in_another_spelling_passes(tmp_path, caplog):
    check_dataset(**declare(tmp_path, {"0": "background", "1": "Spleen", "2": "rkid", "3": "liver"}))
    assert "rkid" in caplog.text


def test_names_in_another_script_pass(tmp_path):
    names = {"0": "фон", "1": "печень", "2": "селезёнка", "3": "+"}
    check_dataset(**(declare(tmp_path, names) | {"row": OWN_ROW | {"labels": names}}))
    swapped = names | {"1": "Селезёнка", "2": "печень"}
    with pytest.raises(InputError, match="declares labels"):
        check_dataset(**(declare(tmp_path, swapped) | {"row": OWN_ROW | {"labels": names}}))


def test_a_list_that_gives_a_name_to_another_value_is_refused_with_the_labels_to_pass(tmp_path):
    swapped = {"0": "background", "1": "liver", "2": "right kidney", "3": "spleen"}
    with pytest.raises(InputError, match="--labels .*'1': 'liver'"):
        check_dataset(**declare(tmp_path, swapped))
    check_dataset(**declare(tmp_path, swapped), labels=swapped)  # as the message says


def test_a_list_with_other_values_is_refused(tmp_path):
    with pytest.raises(InputError, match="declares labels"):
        check_dataset(**declare(tmp_path, {"0": "background", "1": "spleen"}))
