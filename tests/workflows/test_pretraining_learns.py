# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The preset of the demo learns all its tasks on the demo's patients."""

from __future__ import annotations

import json
import math

import pytest
from scipy.stats import binomtest

from tools.synthetic_ct import write_dataset

from .command_line import run_bundle, succeed


@pytest.fixture(scope="module")
def demo_patients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_dataset(folder)
    return folder / "unlabelled"


@pytest.mark.slow
def test_preset_cpu_learns_to_restore_to_recognise_and_to_tell_angles(tmp_path, demo_patients):
    """With the learning rate twice as high, the embeddings collapsed (README of the bundle)."""
    options = {"preset": "cpu", "dataset_dir": demo_patients, "output_dir": tmp_path, "tensorboard": False}
    output = succeed(run_bundle("swin_unetr_pretrain", "train.yaml", **options))
    report = json.loads((tmp_path / "validation.json").read_text())
    views, right = report["views"], round(report["views"] * report["rotation_accuracy"])
    assert views == 48 and binomtest(right, views, 0.25, alternative="greater").pvalue < 0.05
    assert report["contrast_without_learning"] == pytest.approx(math.log(7))
    assert report["loss_contrast"] < math.log(7) - 0.3
    assert report["masked_psnr"] > report["masked_psnr_of_a_constant"] + 0.5
    assert report["effective_rank"] > 5  # about 1 if collapsed
    assert "This pre-training learnt all its tasks: rotation, contrast, inpainting" in output.splitlines()[-1]
