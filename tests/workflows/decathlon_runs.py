# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Shared by the tests of the Decathlon's tasks: run each step from data folder to archive, and check its results."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml

from .command_line import BUNDLES, run_bundle, succeed
from .miniature_decathlon import write_miniature

TABLE = yaml.safe_load((BUNDLES / "swin_unetr_msd" / "configs" / "tasks.yaml").read_text())
CT, MR = ([task for task, row in TABLE.items() if row["modality"] == modality] for modality in ("CT", "MR"))
# Spacing, ROI, window and batch are those of the row; only depth and steps are reduced.
SHORT = {"preset": "cpu", "depths": "[1,1,1,1]", "max_steps": 2, "val_interval": 2, "log_every": 1}


@dataclass(frozen=True)
class TaskRun:
    """A small version of a task. Training and evaluation run through the command line when first accessed.

    Attributes:
        folder: folder for data and results.
        task: name of the task.
    """

    folder: Path
    task: str

    @property
    def row(self) -> dict:
        """The task's row with its values for the preset."""
        return {"hu_window": None, **TABLE[self.task], **TABLE[self.task]["cpu"]}

    @property
    def organs(self) -> list[str]:
        return [name for value, name in self.row["labels"].items() if value != "0"]

    @cached_property
    def data(self) -> Path:
        return write_miniature(self.folder / "data", self.task)

    @cached_property
    def model(self) -> Path:
        output = self.folder / "runs" / self.task
        train(self.task, dataset_dir=self.data, output_dir=output)
        return output / "models" / "model.pt"

    @cached_property
    def evaluation(self) -> Path:
        """Output folder of the evaluation."""
        return evaluate(self.model, dataset_dir=self.data, output_dir=self.model.parents[1] / "evaluation")

    @property
    def masks(self) -> Path:
        return self.folder / "masks" / self.task

    def scores(self) -> list[dict[str, str]]:
        return read_csv(self.evaluation / "scores.csv")


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def train(task: str | Path, **options: object) -> None:
    succeed(run_bundle("swin_unetr_msd", "train.yaml", task=task, **SHORT, **options))


def evaluate(model: Path, *, dataset_dir: Path, output_dir: Path) -> Path:
    """Evaluate without naming the task, which is recorded in the model."""
    options = {"preset": "cpu", "dataset_dir": dataset_dir, "output_dir": output_dir}
    succeed(run_bundle("swin_unetr_msd", "evaluate.yaml", pretrained_model=model, **options))
    return output_dir


def submit(runs: Mapping[str, TaskRun]) -> Path:
    """Predict the test images of all tasks and pack the masks in one run; return the archive."""
    folder = next(iter(runs.values())).folder
    options = {
        "data_dirs": folder / "data",
        "models": {task: str(run.model) for task, run in runs.items()},
        "tasks": {task: str(run.masks) for task, run in runs.items()},
        "inference": {"preset": "cpu"},
        "archive": folder / "submission.zip",
    }
    succeed(run_bundle("swin_unetr_msd", "submit.yaml", **options))
    return options["archive"]


def check_model(run: TaskRun) -> None:
    """Assert that the model file records task, labels, channels and everything else that its masks depend on."""
    model, row = torch.load(run.model, weights_only=True), run.row
    assert model["task"] == run.task
    assert model["labels"] == row["labels"]
    keys = ("modality", "channels", "labels", "spacing", "roi_size", "foreground", "nsd_tolerance", "hu_window")
    assert model["row"] == {key: row[key] for key in keys}
    assert model["encoder"]["in_channels"] == len(row["channels"])
    assert model["model"]["out.conv.conv.weight"].shape[0] == len(row["labels"])
    assert model["model"]["swinViT.patch_embed.proj.weight"].shape[1] == len(row["channels"])
    assert model["trained"]["steps"] == 2


def check_evaluation(run: TaskRun) -> None:
    """Assert that the held-out case (one of five) has a score for every label, at the row's tolerance."""
    rows = run.scores()
    (case,) = {row["case"] for row in rows}
    assert (run.data / "labelsTr" / f"{case}.nii.gz").is_file()
    assert [row["label"] for row in rows] == run.organs
    assert all(0 <= float(row[metric]) <= 1 for row in rows for metric in ("dice", "nsd"))
    summary = json.loads((run.evaluation / "summary.json").read_text())
    assert summary["tolerance"] == dict.fromkeys(run.organs, run.row["nsd_tolerance"])
    assert summary["cases"] == [case]
    assert summary["evaluated"]["task"] == run.task
    (model,) = summary["evaluated"]["models"]
    assert (model["held_out"], model["start"], model["steps"]) == (True, "scratch", 2)


def check_submission(run: TaskRun, archive: Path) -> None:
    """Assert that every test image has a mask in the task's folder, with its name and grid and declared labels."""
    images = sorted((run.data / "imagesTs").glob("*.nii.gz"))
    assert len(images) == 2
    with zipfile.ZipFile(archive) as packed:
        members = [name for name in packed.namelist() if name.startswith(f"{run.task}/")]
        assert members == [f"{run.task}/{image.name}" for image in images]
        masks = [nib.Nifti1Image.from_bytes(gzip.decompress(packed.read(name))) for name in members]
    for image, mask in zip(map(nib.load, images), masks, strict=True):
        assert mask.get_data_dtype() == np.uint8
        assert mask.shape == image.shape[:3]
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
        assert set(np.unique(mask.dataobj)) <= set(map(int, run.row["labels"]))
