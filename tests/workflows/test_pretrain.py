# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The workflows of swin_unetr_pretrain, through the command line."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from bundles.common.training_log import read_log

from .command_line import SMALL, kill_when, run_bundle, succeed

pytestmark = pytest.mark.xdist_group("pretrain")
SMALL = {**SMALL, "roi_size": "[64,64,32]"}


def test_training_ends_with_an_encoder_that_says_what_it_is(pretrained):
    encoder = torch.load(pretrained / "models" / "encoder.pt", weights_only=True)
    assert set(encoder) == {"state_dict", "encoder", "trained"}
    assert encoder["encoder"] == {
        **{"in_channels": 1, "feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
        **{"window_size": 4, "patch_size": 2, "merging": "monai", "use_v2": False},
    }
    assert all(name.startswith("swinViT.") for name in encoder["state_dict"])
    assert encoder["trained"]["steps"] == 2
    model = torch.load(pretrained / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(model["model"][name], tensor) for name, tensor in encoder["state_dict"].items())


def test_training_writes_curves_and_panels(pretrained):
    assert [row["step"] for row in read_log(pretrained / "training_log.csv")] == [1, 2]
    for picture in ("loss_curves", "panel_inpainting", "panel_contrast", "panel_rotation"):
        assert (pretrained / f"{picture}.png").stat().st_size > 5000


def test_evaluation_repeats_the_validation_of_the_training(tmp_path, pretrained, unlabelled):
    model = pretrained / "models" / "model.pt"
    options = {name: SMALL[name] for name in ("preset", "roi_size")}
    run = run_bundle(
        "swin_unetr_pretrain",
        "evaluate.yaml",
        cwd=tmp_path,
        dataset_dir=unlabelled,
        pretrained_model=model,
        output_dir=tmp_path / "out",
        **options,
    )
    succeed(run)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    validation = json.loads((pretrained / "validation.json").read_text())
    assert evaluation == pytest.approx(validation, rel=1e-5)


def test_inference_reconstructs_and_embeds_in_the_scans_geometry(tmp_path, pretrained, unlabelled):
    scan = unlabelled / "site 0" / "scan.nii.gz"
    options = {name: SMALL[name] for name in ("preset", "roi_size")}
    run = run_bundle(
        "swin_unetr_pretrain",
        "inference.yaml",
        dataset_dir=scan,
        pretrained_model=pretrained / "models" / "model.pt",
        output_dir=tmp_path,
        mask_fill="['zero']",
        **options,
    )
    succeed(run)
    original, masked = nib.load(scan), nib.load(tmp_path / "scan_masked.nii.gz")
    reconstruction = nib.load(tmp_path / "scan_reconstruction.nii.gz")
    for image in (masked, reconstruction):
        assert image.shape == original.shape
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-4)
    tissue = original.get_fdata() > -200
    hidden = (masked.get_fdata() < -600)[tissue].mean()
    assert 0.15 < hidden < 0.45  # 0.3 of every window is set to the lower end of the HU window
    embedding = np.load(tmp_path / "scan_embedding.npz")
    assert embedding["embedding"].shape == (192,)
    np.testing.assert_allclose(embedding["embedding"], embedding["windows"].mean(axis=0), rtol=1e-5)
    assert (tmp_path / "scan_reconstruction.png").exists()


def test_a_killed_run_resumes_to_the_weights_of_the_unbroken_one(tmp_path, unlabelled):
    options = {**SMALL, "max_steps": 6, "dataset_dir": unlabelled}
    succeed(run_bundle("swin_unetr_pretrain", "train.yaml", output_dir=tmp_path / "whole", **options))
    killed = tmp_path / "killed"
    kill_when("swin_unetr_pretrain", "train.yaml", appears=killed / "models" / "last.pt", output_dir=killed, **options)
    assert not (killed / "models" / "model.pt").exists()
    output = succeed(run_bundle("swin_unetr_pretrain", "train.yaml", output_dir=killed, resume=True, **options))
    assert "the run goes on after step" in output
    whole, resumed = (torch.load(run / "models" / "last.pt", weights_only=True) for run in (tmp_path / "whole", killed))
    assert whole["step"] == resumed["step"] == 6
    assert all(torch.equal(tensor, resumed["network"][name]) for name, tensor in whole["network"].items())
    assert [row["step"] for row in read_log(killed / "training_log.csv")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_share_the_draws_and_write_once(tmp_path, unlabelled):
    run = run_bundle(
        "swin_unetr_pretrain",
        ["train.yaml", "multi_gpu_train.yaml"],
        processes=2,
        dataset_dir=unlabelled,
        output_dir=tmp_path,
        **{**SMALL, "batch_size": 1},
    )
    output = succeed(run)
    assert output.count("step 2/2") == 1  # rank 0 alone reports
    assert torch.load(tmp_path / "models" / "encoder.pt", weights_only=True)["trained"]["steps"] == 2


def test_torchrun_without_the_overlay_is_refused(tmp_path, unlabelled):
    run = run_bundle(
        "swin_unetr_pretrain", "train.yaml", processes=2, dataset_dir=unlabelled, output_dir=tmp_path, **SMALL
    )
    assert run.returncode != 0
    assert "multi_gpu_train.yaml" in run.stderr


def test_one_task_alone_trains(tmp_path, unlabelled):
    run = run_bundle(
        "swin_unetr_pretrain", "train.yaml", dataset_dir=unlabelled, output_dir=tmp_path, tasks="['rotation']", **SMALL
    )
    succeed(run)
    assert set(read_log(tmp_path / "training_log.csv")[0]) == {
        *("step", "loss", "loss_rotation", "learning_rate", "crops_per_second"),
    }
