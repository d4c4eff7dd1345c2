# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Inference and evaluation with OpenVINO give PyTorch's masks and scores, and say what computed them."""

from __future__ import annotations

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest

from ..segmentation.backend.conftest import needs_openvino
from .command_line import run_bundle, succeed

WINDOW = {"preset": "cpu", "roi_size": "[64,64,32]", "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory, segmenter):
    folder = tmp_path_factory.mktemp("model")
    return shutil.copy(segmenter / "models" / "model.pt", folder)


@needs_openvino
def test_masks_and_scores_are_pytorchs_and_the_conversion_is_read_again(tmp_path, model, btcv):
    scan = btcv / "imagesTr" / "img0002.nii.gz"
    masks = {}
    for backend in ("torch", "openvino"):
        options = {"dataset_dir": scan, "pretrained_model": model, "output_dir": tmp_path / backend, **WINDOW}
        output = succeed(run_bundle("swin_unetr_btcv_seg", "inference.yaml", **options, backend=backend))
        masks[backend] = np.asarray(nib.load(tmp_path / backend / "img0002_seg.nii.gz").dataobj)
    assert re.search(r"model\.pt: OpenVINO \S+ computes it in fp32 with 1 thread; .*; converted in", output)
    assert f"scan 1 of 1: {scan}" in output
    assert (masks["torch"] == masks["openvino"]).mean() >= 0.999 and len(np.unique(masks["torch"])) > 1

    summaries = {}
    for backend in ("torch", "openvino"):
        options = {
            "dataset_dir": btcv,
            "pretrained_model": model,
            "output_dir": tmp_path / f"{backend}_scores",
            **WINDOW,
        }
        output = succeed(run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", **options, backend=backend))
        summaries[backend] = json.loads((tmp_path / f"{backend}_scores" / "summary.json").read_text())
    assert "; read in" in output
    assert summaries["openvino"]["mean_dice"] == pytest.approx(summaries["torch"]["mean_dice"], abs=2e-3)
    (computed,) = summaries["openvino"]["evaluated"]["computed_by"]
    assert computed.startswith("OpenVINO 2")
    assert summaries["torch"]["evaluated"]["computed_by"][0].startswith("PyTorch 2")


def test_another_backend_is_refused_with_the_known_ones(tmp_path, model, btcv):
    options = {"dataset_dir": btcv / "imagesTr", "pretrained_model": model, "output_dir": tmp_path / "out", **WINDOW}
    ended = run_bundle("swin_unetr_btcv_seg", "inference.yaml", **options, backend="onnx")
    assert ended.returncode == 1 and "--backend 'onnx' is not one of torch, openvino" in ended.stdout + ended.stderr
    assert not (tmp_path / "out").exists()
