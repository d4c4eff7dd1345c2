# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A single task of the Decathlon becomes a bundle: with its labels, number of channels and defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.segmentation.tasks.tasks import choose_task, task_values
from zoo.pack import stage
from zoo.package.bundle_files import BUNDLES
from zoo.package.flat_task import find_task, flat_name
from zoo.package.names import KINDS
from zoo.verify import verify

from ..conftest import ROWS, save_btcv, save_task, trained_row

MSD = "swin_unetr_msd"
TABLE = BUNDLES / MSD / "configs" / "tasks.yaml"
NAMES = {
    "Task01_BrainTumour": "swin_unetr_msd_braintumour",
    "Task02_Heart": "swin_unetr_msd_heart",
    "Task03_Liver": "swin_unetr_msd_liver",
    "Task04_Hippocampus": "swin_unetr_msd_hippocampus",
    "Task05_Prostate": "swin_unetr_msd_prostate",
    "Task06_Lung": "swin_unetr_msd_lung",
    "Task07_Pancreas": "swin_unetr_msd_pancreas",
    "Task08_HepaticVessel": "swin_unetr_msd_hepaticvessel",
    "Task09_Spleen": "swin_unetr_msd_spleen",
    "Task10_Colon": "swin_unetr_msd_colon",
}
OWN = """# proposed from /home/ann/kidneys/dataset.json
Task501_Kidney:
  modality: MR
  channels: [T1, T2]  # of our scanner
  labels: {"0": background, "1": kidney, "2": cyst}
  spacing: [1.5, 1.5, 2.0]
  roi_size: [64, 64, 32]
  foreground: 0.0
  nsd_tolerance: 2.0
  cpu: {spacing: [3.0, 3.0, 4.0]}
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """Bundles of all ten tasks, by task."""
    folder = tmp_path_factory.mktemp("staged")
    return {
        task: stage(MSD, folder=folder, task=task, models=save_task(folder / "weights" / task, task)) for task in ROWS
    }


@pytest.fixture
def own(tmp_path):
    (tmp_path / "task.yaml").write_text(OWN)
    return str(tmp_path / "task.yaml")


def metadata(folder: Path) -> dict:
    return json.loads((folder / "configs" / "metadata.json").read_text())


def test_the_ten_names(staged):
    assert {task: flat_name(task) for task in ROWS} == NAMES
    assert {task: folder.name for task, folder in staged.items()} == NAMES
    assert not any("_v" in name or any(kind in name for kind in KINDS) for name in NAMES.values())


@pytest.mark.parametrize("task", ["Task500_Vertebrae", "vertebrae"])
def test_a_task_of_ones_own_whose_name_would_be_cut_off_gets_another_in_time(task):
    assert flat_name(task) == "swin_unetr_msd_taskvertebrae"


@pytest.mark.parametrize(("task", "message"), [("NoduleDetection", "'detection'"), ("Task1_", "letters")])
def test_a_task_of_ones_own_whose_name_clients_would_misread_is_refused(task, message):
    with pytest.raises(InputError, match=f"task {task}.*{message}"):
        flat_name(task)


@pytest.mark.parametrize("task", NAMES)
def test_every_check_of_the_files_passes(staged, task):
    verdicts = list(verify(staged[task], build=False))
    assert len(verdicts) >= 14
    assert [verdict for verdict in verdicts if verdict.outcome == "FAILED"] == []


@pytest.mark.parametrize("task", NAMES)
def test_metadata_are_those_of_the_task(staged, task):
    row, content = ROWS[task], metadata(staged[task])
    image, pred = (
        content["network_data_format"][kind][name] for kind, name in (("inputs", "image"), ("outputs", "pred"))
    )
    assert content["name"] == NAMES[task]
    assert image["num_channels"] == len(row["channels"])
    assert list(image["channel_def"].values()) == row["channels"]
    assert pred["channel_def"] == row["labels"] and pred["num_channels"] == len(row["labels"])
    assert image["modality"] == row["modality"]
    ct = row["modality"] == "CT"
    assert (image["format"], image["value_range"]) == (("hounsfield", [0, 1]) if ct else ("magnitude", [-10, 10]))
    assert all(name.replace("_", " ") in content["task"] for value, name in row["labels"].items() if value != "0")
    assert task in content["description"]
    kept = {
        key: value for key, value in content.items() if key in ("version", "changelog", "required_packages_version")
    }
    assert kept.items() <= metadata(BUNDLES / MSD).items()


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("name", ["train", "evaluate", "inference"])
def test_without_an_option_each_workflow_takes_the_task_of_the_bundle(staged, task, name):
    configs = staged[task] / "configs"
    config = ConfigParser.load_config_file(str(configs / f"{name}.yaml"))
    assert (config["task"], config["preset"]) == (task, "cpu")
    row = choose_task(task=config["task"], file=str(configs / "tasks.yaml"), preset=config["preset"])
    assert {key: row[key] for key in trained_row(task)} == trained_row(task)
    assert row["name"] == task
    expected = choose_task(task=task, file=str(TABLE), preset="cpu")
    files = [{"preset": "cpu", "file": str(folder / "presets.yaml")} for folder in (configs, TABLE.parent)]
    assert task_values(**files[0], row=row) == task_values(**files[1], row=expected)


def test_the_table_holds_that_row_alone_with_its_comments(staged):
    text = (staged["Task05_Prostate"] / "configs/tasks.yaml").read_text()
    assert yaml.safe_load(text) == {"Task05_Prostate": ROWS["Task05_Prostate"]}
    assert "# R; an author stated 0.5 mm" in text
    assert "R  values published for another method" in text  # the header that explains R


def test_comments_and_names_in_configs_are_the_tasks(staged):
    configs = staged["Task03_Liver"] / "configs"
    text = (configs / "train.yaml").read_text()
    assert "such as --task Task03_Liver" in text
    assert "task: Task03_Liver  # a name in tasks.yaml" in text
    for path in configs.iterdir():
        assert "Task09_Spleen" not in path.read_text()
    assert json.loads((configs / "metadata.json").read_text())["name"] == "swin_unetr_msd_liver"  # who made a DICOM SEG


def test_other_defaults_than_task_preset_and_network_are_those_of_the_source(staged):
    for name, changed in {"train": {"task", "preset", "depths"}, "evaluate": {"task", "preset"}}.items():
        old, new = (
            ConfigParser.load_config_file(str(folder / "configs" / f"{name}.yaml"))
            for folder in (BUNDLES / MSD, staged["Task03_Liver"])
        )
        assert {key for key in old | new if old.get(key) != new.get(key)} == changed


def test_what_is_for_the_whole_decathlon_stays_out(staged):
    folder = staged["Task09_Spleen"]
    assert not any((folder / "configs" / name).exists() for name in ("results.yaml", "submit.yaml"))
    parts = [{path.name for path in (above / "scripts").iterdir()} for above in (BUNDLES / MSD, folder)]
    assert parts[0] - parts[1] - {"__pycache__"} == {"decathlon"}


def test_the_readme_is_the_tasks(staged):
    text = (staged["Task01_BrainTumour"] / "docs/README.md").read_text()
    assert text.startswith("# swin_unetr_msd_braintumour\n")
    assert "edema, non enhancing tumor and enhancing tumor on MR" in text
    assert "| 3 | enhancing tumor |" in text
    assert "4 channels along the fourth axis of the file: FLAIR, T1w, T1gd, T2w" in text
    assert "3 x 3 x 3 mm" in text and "z-score" in text


def test_settings_of_the_weights_go_before_the_tables(tmp_path):
    models = save_task(tmp_path / "m", "Task03_Liver", spacing=[3.5, 3.5, 4.0], nsd_tolerance=9.0)
    folder = stage(MSD, folder=tmp_path / "staged", task="Task03_Liver", models=models)
    table = str(folder / "configs/tasks.yaml")
    row = choose_task(task="Task03_Liver", file=table, preset="cpu")
    assert {key: row[key] for key in trained_row("Task03_Liver")} == trained_row(
        "Task03_Liver", spacing=[3.5, 3.5, 4.0], nsd_tolerance=9.0
    )
    assert ConfigParser.load_config_file(table)["Task03_Liver"]["official"] == ROWS["Task03_Liver"]["official"]
    assert "differ from the table" in Path(table).read_text()
    assert "3.5 x 3.5 x 4 mm" in (folder / "docs/README.md").read_text()


def test_a_task_of_ones_own(tmp_path, own, monkeypatch):
    row = yaml.safe_load(OWN)["Task501_Kidney"]
    monkeypatch.setitem(ROWS, "Task501_Kidney", row)
    models = save_task(tmp_path / "m", "Task501_Kidney")
    folder = stage(MSD, folder=tmp_path / "staged", task=own, models=models)
    assert folder.name == "swin_unetr_msd_kidney"
    table = folder / "configs/tasks.yaml"
    assert yaml.safe_load(table.read_text()) == {"Task501_Kidney": row}
    assert "# of our scanner" in table.read_text()
    assert not any("/home/ann" in path.read_text() for path in folder.glob("configs/*"))
    content = metadata(folder)
    assert content["network_data_format"]["outputs"]["pred"]["channel_def"] == row["labels"]
    assert "data_source" not in content and "Decathlon" not in content["description"]
    assert "Decathlon" not in (folder / "docs/README.md").read_text()
    assert [verdict for verdict in verify(folder, build=False) if verdict.outcome == "FAILED"] == []


def test_trained_weights_of_a_name_that_is_taken_are_packed_once_it_is_changed_in_both(tmp_path, monkeypatch):
    """As described in docs/how-to/publish.md."""
    monkeypatch.setitem(ROWS, "Task901_Spleen", yaml.safe_load(OWN)["Task501_Kidney"])
    path = save_task(tmp_path / "m", "Task901_Spleen") / "model.pt"
    content = torch.load(path, map_location="cpu", weights_only=True)
    torch.save(content | {"task": "Task901_SpleenOwn"}, path)
    (tmp_path / "task.yaml").write_text(OWN.replace("Task501_Kidney", "Task901_SpleenOwn"))
    folder = stage(MSD, folder=tmp_path / "staged", task=str(tmp_path / "task.yaml"), models=tmp_path / "m")
    assert folder.name == "swin_unetr_msd_spleenown"
    assert [verdict for verdict in verify(folder, build=False) if verdict.outcome == "FAILED"] == []


def test_weights_of_another_task_are_refused_with_both(tmp_path):
    models = save_task(tmp_path / "m", "Task03_Liver")
    with pytest.raises(InputError, match=r"model\.pt was trained for Task03_Liver, not for Task07_Pancreas"):
        stage(MSD, folder=tmp_path / "staged", task="Task07_Pancreas", models=models)


def test_weights_that_say_other_labels_and_no_task_are_refused(tmp_path):
    labels = {"0": "background", "1": "kidney"}
    with pytest.raises(InputError, match="trained for the labels .*kidney.*Task09_Spleen has .*spleen"):
        stage(MSD, folder=tmp_path / "s", task="Task09_Spleen", models=save_btcv(tmp_path / "m", labels=labels))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, "has many tasks.*--task Task09_Spleen"),
        ("Task9_Spleen", "'Task9_Spleen' is not in .*Task09_Spleen"),
        ("nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_a_task_that_is_not_there_is_refused(tmp_path, spleen_models, task, message):
    with pytest.raises(InputError, match=message):
        stage(MSD, folder=tmp_path, task=task, models=spleen_models)


def test_a_task_for_a_bundle_without_tasks_is_refused(tmp_path, btcv_models):
    with pytest.raises(InputError, match="swin_unetr_btcv_seg has only the task BTCV"):
        stage("swin_unetr_btcv_seg", folder=tmp_path, task="Task09_Spleen", models=btcv_models)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN + "Other: {modality: CT}\n", "must contain one row.*Task501_Kidney, Other"),
        ("Kidney: {modality: CT}\n", "Kidney lacks channels, labels, spacing, roi_size"),
        ("- a\n", "must contain rows under their names"),
        ("1: {modality: CT}\n", "must contain rows under their names"),
        ("Kidney: {modality: [CT\n", r"task\.yaml cannot be read as YAML"),
        (b"Kidney: \xff\n", r"task\.yaml cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_row_is_refused(tmp_path, text, message):
    (tmp_path / "task.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        find_task(str(tmp_path / "task.yaml"), TABLE)


def test_of_two_rows_of_one_name_the_last_counts(tmp_path):
    (tmp_path / "task.yaml").write_text(OWN.replace("MR", "CT") + OWN)
    task = find_task(str(tmp_path / "task.yaml"), TABLE)
    assert task.row["modality"] == "MR" and yaml.safe_load(task.text) == {task.name: task.row}


@pytest.mark.parametrize("name", ["Task901_Spleen", "spleen", "Task09_Spleen"])
def test_a_task_of_ones_own_that_would_take_the_name_of_one_of_the_ten_is_refused(tmp_path, name):
    (tmp_path / "task.yaml").write_text(OWN.replace("Task501_Kidney", name))
    message = f"task.yaml: the bundle of {name} would be called swin_unetr_msd_spleen, like that of Task09_Spleen.*Rename the row"
    with pytest.raises(InputError, match=message):
        find_task(str(tmp_path / "task.yaml"), TABLE)
    (tmp_path / "tasks.yaml").write_text(TABLE.read_text() + OWN.replace("Task501_Kidney", name))
    if name != "Task09_Spleen":
        with pytest.raises(InputError, match="tasks.yaml: the bundle of"):
            find_task(name, tmp_path / "tasks.yaml")
    assert find_task("Task09_Spleen", tmp_path / "tasks.yaml").name == "Task09_Spleen"
