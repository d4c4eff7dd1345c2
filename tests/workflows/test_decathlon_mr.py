# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Miniature MR tasks of the Decathlon through the command line, with one, two and four channels."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from .command_line import run_bundle, succeed
from .decathlon_runs import MR, TaskRun, check_evaluation, check_model, check_submission, submit


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, TaskRun]:
    folder = tmp_path_factory.mktemp("mr")
    return {task: TaskRun(folder, task) for task in MR}


@pytest.fixture(scope="module")
def archive(runs):
    return submit(runs)


@pytest.mark.parametrize("task", MR)
def test_a_task_trains(runs, task):
    check_model(runs[task])


@pytest.mark.parametrize("task", MR)
def test_a_task_is_evaluated(runs, task):
    check_evaluation(runs[task])


@pytest.mark.parametrize("task", MR)
def test_a_task_is_submitted(runs, task, archive):
    check_submission(runs[task], archive)


@pytest.mark.parametrize("task", ["Task01_BrainTumour", "Task05_Prostate"])
def test_inference_on_files_of_several_channels_is_what_was_submitted_and_scored(runs, task, archive, tmp_path):
    run = runs[task]
    case = run.scores()[0]["case"]
    held_out, tested = (run.data / "imagesTr" / f"{case}.nii.gz"), min((run.data / "imagesTs").iterdir())
    assert nib.load(tested).shape[3:] == (len(run.row["channels"]),)
    options = {"preset": "cpu", "pretrained_model": run.model, "output_dir": tmp_path}
    succeed(run_bundle("swin_unetr_msd", "inference.yaml", dataset_dir=[str(held_out), str(tested)], **options))

    def mask(folder, image) -> np.ndarray:
        return np.asarray(nib.load(folder / image.name.replace(".nii.gz", "_seg.nii.gz")).dataobj)

    submitted = mask(run.masks, tested)
    assert len(np.unique(submitted)) > 1
    np.testing.assert_array_equal(mask(tmp_path, tested), submitted)
    predicted = mask(tmp_path, held_out)
    truth = np.asarray(nib.load(run.data / "labelsTr" / held_out.name).dataobj)
    for scored, value in zip(run.scores(), range(1, len(run.organs) + 1), strict=True):
        both, either = (predicted == value) & (truth == value), np.sum(predicted == value) + np.sum(truth == value)
        assert float(scored["dice"]) == pytest.approx(2 * both.sum() / either, abs=1e-6)


def refused(config: str, **options) -> str:
    run = run_bundle("swin_unetr_msd", config, preset="cpu", **options)
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-4000:]
    assert "Traceback" not in run.stderr
    return run.stderr[run.stderr.rindex("Stopped:") :]


def rewrite(path: Path, change) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


@pytest.fixture
def spoilt(tmp_path, runs) -> Path:
    """Brain tumours with faults: a scan without T2w, one with only FLAIR, a resampled label, a one-hot label."""
    folder = shutil.copytree(runs["Task01_BrainTumour"].data, tmp_path / "spoilt")
    rewrite(folder / "imagesTr" / "BRATS_001.nii.gz", lambda image: image[..., :3])
    rewrite(folder / "imagesTr" / "BRATS_005.nii.gz", lambda image: image[..., 0])
    rewrite(folder / "labelsTr" / "BRATS_009.nii.gz", lambda label: label.astype(np.float32) / 2)
    rewrite(folder / "labelsTr" / "BRATS_013.nii.gz", lambda label: (label[..., None] == np.arange(4)).astype(np.uint8))
    return folder


def test_scans_that_lack_channels_and_labels_that_are_no_integers_are_named_before_training(spoilt, tmp_path):
    message = refused("train.yaml", task="Task01_BrainTumour", dataset_dir=spoilt, output_dir=tmp_path / "output")
    assert "4 of 5 scans are bad" in message
    lines = {name: line for line in message.splitlines() for name in re.findall(r"BRATS_\d+", line)}
    assert "it holds 3 channels, but 4 are expected" in lines["BRATS_001"]
    assert "not (X, Y, Z, 4): it holds one channel, but 4 are expected" in lines["BRATS_005"]
    assert "holds the label values 0.5, 1.5; allowed are the declared 0, 1, 2, 3" in lines["BRATS_009"]
    assert "label" in lines["BRATS_013"] and "it must be one 3D volume" in lines["BRATS_013"]
    assert not (tmp_path / "output" / "models").exists()


def test_scans_that_lack_channels_are_left_out_of_an_inference(spoilt, runs, tmp_path):
    options = {"dataset_dir": spoilt / "imagesTr", "output_dir": tmp_path / "output"}
    options["pretrained_model"] = runs["Task01_BrainTumour"].model
    run = run_bundle("swin_unetr_msd", "inference.yaml", preset="cpu", **options)
    assert run.returncode == 3 and "3 of 5 scans are done" in run.stdout + run.stderr
    with open(tmp_path / "output" / "failed.csv", newline="") as file:
        reasons = {Path(row["scan"]).name: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"BRATS_001.nii.gz", "BRATS_005.nii.gz"}
    assert "it holds 3 channels, but 4 are expected" in reasons["BRATS_001.nii.gz"]
    assert "it holds one channel, but 4 are expected" in reasons["BRATS_005.nii.gz"]
    assert len(list((tmp_path / "output").glob("*_seg.nii.gz"))) == 3
