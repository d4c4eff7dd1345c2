# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The workflows of swin_unetr_msd, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import nibabel as nib
import numpy as np
import pytest
import torch

from .command_line import SMALL, run_bundle, succeed

WINDOW = {"preset": "cpu", "roi_size": "[64,64,32]"}


@pytest.fixture(scope="module")
def spleen_model(tmp_path_factory, spleen, pretrained):
    """A small Task09 model, fine-tuned from the encoder."""
    output = tmp_path_factory.mktemp("spleen")
    options = {
        **SMALL,
        "depths": None,
        "roi_size": "[64,64,32]",
        "pretrained_encoder": pretrained / "models" / "encoder.pt",
    }
    run = run_bundle(
        "swin_unetr_msd", "train.yaml", task="Task09_Spleen", dataset_dir=spleen, output_dir=output, **options
    )
    succeed(run)
    return output / "models" / "model.pt"


def test_the_model_knows_its_task(spleen_model):
    model = torch.load(spleen_model, weights_only=True)
    assert model["task"] == "Task09_Spleen"
    assert model["labels"] == {"0": "background", "1": "spleen"}


def test_a_training_takes_a_whole_network_with_other_classes(tmp_path, segmenter, spleen):
    """All of the BTCV network but its output layer; model.pt, log and MLflow keep what came from the file."""
    options = {**SMALL, "depths": None, "roi_size": "[64,64,32]", "pretrained_model": segmenter / "models" / "model.pt"}
    options |= {"task": "Task09_Spleen", "dataset_dir": spleen, "output_dir": tmp_path / "run", "max_steps": 2}
    options |= {"tracking": "mlflow", "tracking_uri": f"sqlite:///{tmp_path}/mlruns.db"}
    output = succeed(run_bundle("swin_unetr_msd", "train.yaml", **options))
    assert "classes: 14 in the file, 2 here: the output layer starts anew" in output
    start = torch.load(tmp_path / "run" / "models" / "model.pt", weights_only=True)["trained"]["start"]
    assert start["missing"] == ["out.conv.conv.bias", "out.conv.conv.weight"]
    table = start["modules"]
    assert table["decoder1"]["per_cent"] == table["swinViT"]["per_cent"] == 100.0 and table["out"]["from_file"] == 0
    client = mlflow.MlflowClient(options["tracking_uri"])
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    kept = Path(client.download_artifacts(run.info.run_id, "start_weights.txt", str(tmp_path)))
    assert f"all  {table['all']['from_file']:,}".split() == kept.read_text().splitlines()[-1].split()[:2]


def test_evaluation_scores_the_fold_that_training_held_out(tmp_path, spleen_model, spleen):
    succeed(
        run_bundle(
            "swin_unetr_msd",
            "evaluate.yaml",
            dataset_dir=spleen,
            pretrained_model=spleen_model,
            output_dir=tmp_path,
            **WINDOW,
        )
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["cases"]) == 1  # one of five
    assert summary["tolerance"] == {"spleen": 3.0}


def test_inference_predicts_the_test_section(tmp_path, spleen_model, spleen):
    options = {"cwd": tmp_path, "dataset_dir": spleen / "dataset.json", "output_dir": tmp_path / "out", **WINDOW}
    succeed(run_bundle("swin_unetr_msd", "inference.yaml", pretrained_model=spleen_model, **options))
    original, mask = (
        nib.load(spleen / "imagesTr" / "spleen_0.nii.gz"),
        nib.load(tmp_path / "out" / "spleen_0_seg.nii.gz"),
    )
    assert mask.shape == original.shape
    np.testing.assert_allclose(mask.affine, original.affine, atol=1e-3)
    assert set(np.unique(mask.dataobj)) <= {0, 1}


def test_a_misspelt_task_offers_the_nearest(tmp_path, spleen):
    run = run_bundle("swin_unetr_msd", "train.yaml", task="Task9_Splen", dataset_dir=spleen, output_dir=tmp_path)
    assert run.returncode == 1
    assert "Did you mean Task09_Spleen" in run.stderr.strip().splitlines()[-1]


def test_the_folder_of_another_task_is_refused(tmp_path, spleen):
    run = run_bundle(
        "swin_unetr_msd", "train.yaml", task="Task03_Liver", dataset_dir=spleen, output_dir=tmp_path, preset="cpu"
    )
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert "spleen" in message and "liver" in message and str(spleen / "dataset.json") in message


def test_two_processes_train_together(tmp_path, spleen):
    options = {**SMALL, "batch_size": 1, "task": "Task09_Spleen", "dataset_dir": spleen, "output_dir": tmp_path}
    succeed(run_bundle("swin_unetr_msd", ["train.yaml", "multi_gpu_train.yaml"], processes=2, **options))
    assert (tmp_path / "models" / "model.pt").exists()


def test_an_encoder_of_one_channel_starts_a_task_of_four(tmp_path, brain, pretrained):
    options = {**SMALL, "depths": None, "roi_size": "[64,64,32]", "task": "Task01_BrainTumour", "dataset_dir": brain}
    encoder = pretrained / "models" / "encoder.pt"
    succeed(run_bundle("swin_unetr_msd", "train.yaml", pretrained_encoder=encoder, output_dir=tmp_path, **options))
    model = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert model["encoder"]["in_channels"] == 4
    assert model["trained"]["start"]["patch_embed"] == "1 to 4 channels: repeat"
