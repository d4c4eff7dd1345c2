# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The workflows of swin_unetr_btcv_seg, through the command line."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR

from .command_line import SMALL, run_bundle, succeed

pytestmark = pytest.mark.xdist_group("btcv")
WINDOW = {"preset": "cpu", "roi_size": "[64,64,32]"}


def test_fine_tuning_builds_the_network_of_the_encoder(segmenter, pretrained):
    model = torch.load(segmenter / "models" / "model.pt", weights_only=True)
    encoder = torch.load(pretrained / "models" / "encoder.pt", weights_only=True)
    assert model["encoder"] == encoder["encoder"]
    assert model["encoder"]["depths"] == [1, 1, 1, 1]  # the preset alone would build [2, 2, 2, 2]
    assert model["labels"]["6"] == "liver"
    # A plain MONAI network takes the weights as they are.
    network = SwinUNETR(1, 14, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, feature_size=12)
    network.load_state_dict(model["model"], strict=True)


def test_evaluation_scores_every_organ_in_the_scans_geometry(tmp_path, segmenter, btcv):
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "evaluate.yaml",
        dataset_dir=btcv,
        pretrained_model=segmenter / "models" / "model.pt",
        output_dir=tmp_path,
        **WINDOW,
    )
    succeed(run)
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    assert {row["case"] for row in rows} == {"img0002"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean_dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-5)
    assert (tmp_path / "img0002_overlay.png").exists()


def test_a_mask_has_the_geometry_of_its_scan_and_declared_labels(tmp_path, segmenter, btcv):
    (tmp_path / "scans").mkdir()
    scan = nib.load(btcv / "imagesTr" / "img0002.nii.gz")
    oblique = scan.affine @ np.array([[0.98, -0.2, 0, 0], [0.2, 0.98, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[::-1], oblique), tmp_path / "scans" / "oblique.nii.gz")
    nib.save(scan, tmp_path / "scans" / "plain.nii.gz")
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "inference.yaml",
        cwd=tmp_path,
        dataset_dir=tmp_path / "scans",
        pretrained_model=segmenter / "models" / "model.pt",
        output_dir=tmp_path / "out",
        **WINDOW,
    )
    succeed(run)
    for name in ("oblique", "plain"):
        original, mask = (
            nib.load(tmp_path / "scans" / f"{name}.nii.gz"),
            nib.load(tmp_path / "out" / f"{name}_seg.nii.gz"),
        )
        assert mask.shape == original.shape
        np.testing.assert_allclose(mask.affine, original.affine, atol=1e-3)
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(mask.dataobj)) <= set(range(14))
        assert (tmp_path / "out" / f"{name}_overlay.png").exists()


def test_an_encoder_of_another_size_is_refused_with_both_values(tmp_path, pretrained, btcv):
    encoder = pretrained / "models" / "encoder.pt"
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "train.yaml",
        dataset_dir=btcv,
        output_dir=tmp_path,
        pretrained_encoder=encoder,
        preset="cpu",
        feature_size=24,
    )
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("Stopped:")
    assert str(encoder) in message and "feature_size is 12 there, 24 asked for" in message


def test_two_processes_train_and_evaluate_together(tmp_path, btcv):
    train = run_bundle(
        "swin_unetr_btcv_seg",
        ["train.yaml", "multi_gpu_train.yaml"],
        processes=2,
        dataset_dir=btcv,
        output_dir=tmp_path,
        **{**SMALL, "batch_size": 1},
    )
    succeed(train)
    evaluate = run_bundle(
        "swin_unetr_btcv_seg",
        ["evaluate.yaml", "multi_gpu_evaluate.yaml"],
        processes=2,
        dataset_dir=btcv,
        section="training",
        pretrained_model=tmp_path / "models" / "model.pt",
        output_dir=tmp_path / "evaluation",
        preset="cpu",
    )
    succeed(evaluate)
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert len(summary["cases"]) == 2


def test_training_on_every_case_needs_no_validation(tmp_path, btcv):
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "train.yaml",
        dataset_dir=btcv,
        output_dir=tmp_path,
        fold="all",
        max_gradient_norm=None,
        **SMALL,
    )
    assert "validation" not in succeed(run)
    assert torch.load(tmp_path / "models" / "model.pt", weights_only=True)["trained"]["steps"] == 2
