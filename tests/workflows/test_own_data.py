# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A user's own data as a task: a row is proposed from them, is recorded in the model, and can be edited."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from .command_line import run_bundle, succeed
from .decathlon_runs import evaluate, read_csv, train
from .miniature_decathlon import FORMS, write_miniature

ORGANS = ["left kidney", "cyst"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """CT in the form of MSD, but of a task that is not in the table."""
    folder = write_miniature(tmp_path_factory.mktemp("own"), "Task03_Liver")
    content = json.loads((folder / "dataset.json").read_text())
    content |= {"name": "Own kidneys", "labels": {"0": "background", "1": ORGANS[0], "2": ORGANS[1]}}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory, data) -> Path:
    """Output folder of a training that got only the data list."""
    folder = tmp_path_factory.mktemp("trained")
    train(data / "dataset.json", output_dir=folder)
    return folder


def test_a_row_is_proposed_and_trained_by(output):
    ((name, row),) = yaml.safe_load((output / "task.yaml").read_text()).items()
    assert name == "Own_kidneys"
    assert row["labels"] == {"0": "background", "1": ORGANS[0], "2": ORGANS[1]}
    assert (row["modality"], row["channels"]) == ("CT", ["CT"])
    assert row["spacing"] == list(FORMS["Task03_Liver"].spacing)  # of every scan
    model = torch.load(output / "models" / "model.pt", weights_only=True)
    assert (model["task"], model["labels"]) == (name, row["labels"])
    kept = {**row, **row["cpu"]}
    assert model["row"] == {key: kept[key] for key in model["row"]}
    assert {"spacing", "hu_window", "roi_size", "nsd_tolerance"} <= model["row"].keys()


def test_the_model_is_evaluated_without_naming_the_task(output, data, tmp_path):
    evaluate(output / "models" / "model.pt", dataset_dir=data, output_dir=tmp_path)
    assert [row["label"] for row in read_csv(tmp_path / "scores.csv")] == ORGANS
    summary = json.loads((tmp_path / "summary.json").read_text())
    row = yaml.safe_load((output / "task.yaml").read_text())["Own_kidneys"]
    assert summary["tolerance"] == dict.fromkeys(ORGANS, row["nsd_tolerance"])
    assert summary["evaluated"]["task"] == "Own_kidneys"


def test_the_model_predicts_without_naming_the_task(output, data, tmp_path):
    options = {"preset": "cpu", "pretrained_model": output / "models" / "model.pt", "output_dir": tmp_path}
    succeed(run_bundle("swin_unetr_msd", "inference.yaml", dataset_dir=data / "dataset.json", **options))
    images = sorted((data / "imagesTs").iterdir())
    assert len(images) == 2
    for image in images:
        original, mask = nib.load(image), nib.load(tmp_path / image.name.replace(".nii.gz", "_seg.nii.gz"))
        assert mask.shape == original.shape
        np.testing.assert_allclose(mask.affine, original.affine, atol=1e-4)
        assert set(np.unique(mask.dataobj)) <= {0, 1, 2}


def test_a_row_that_was_edited_is_used(output, data, tmp_path):
    task = yaml.safe_load((output / "task.yaml").read_text())
    task["Own_kidneys"]["cpu"]["spacing"] = [6.0, 6.0, 7.0]
    task["Own_kidneys"]["nsd_tolerance"] = 2.5
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    train(tmp_path / "task.yaml", dataset_dir=data, output_dir=tmp_path)
    model = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert model["task"] == "Own_kidneys"
    assert (model["row"]["spacing"], model["row"]["nsd_tolerance"]) == ([6.0, 6.0, 7.0], 2.5)
