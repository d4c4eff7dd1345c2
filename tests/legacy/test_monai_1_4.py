# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights of the real MONAI 1.4.0 give the same outputs here as there.

``make test-legacy`` sets up a Python with MONAI 1.4.0; without it the tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from bundles.common.networks.swin_unetr import build_encoder, build_swin_unetr
from bundles.common.weights.dialects import official_layout
from bundles.common.weights.encoder_record import read_record
from bundles.common.weights.loading import encoder_state, load_encoder, load_model

PYTHON = os.environ.get("LEGACY_PYTHON")
pytestmark = [
    pytest.mark.legacy,
    pytest.mark.skipif(not PYTHON, reason="needs a Python with MONAI 1.4.0: make test-legacy"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monai_1_4")
    script = Path(__file__).with_name("save_monai_1_4.py")
    subprocess.run([PYTHON, str(script), str(folder)], check=True, timeout=600)
    return folder


def difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("feature_size", [12, 24, 48])
def test_logits_and_features_are_those_of_monai_1_4(saved, tmp_path, feature_size):
    path = str(saved / f"{feature_size}.pt")
    content = torch.load(path, weights_only=True)
    record = read_record(path, merging="legacy")
    network = build_swin_unetr(record, out_channels=3).eval()
    load_model(network, path)
    # also the encoder alone, in the layout of the released encoder
    torch.save({"state_dict": official_layout(encoder_state(network))}, tmp_path / "published.pt")
    encoder = torch.nn.ModuleDict(
        {"swinViT": build_encoder(read_record(str(tmp_path / "published.pt"), merging="legacy"))}
    ).eval()
    load_encoder(encoder, str(tmp_path / "published.pt"))
    newer = build_swin_unetr(record | {"merging": "monai"}, out_channels=3).eval()
    newer.load_state_dict(content["state_dict"])
    with torch.no_grad():
        assert difference(network(content["image"]), content["outputs"]["logits"]) < 1e-5
        features = encoder["swinViT"](content["image"])
        for feature, expected in zip(features, content["outputs"]["features"], strict=True):
            assert difference(feature, expected) < 1e-5
        # with the wrong patch-merging order the weights load without an error, but give other outputs
        assert difference(newer(content["image"]), content["outputs"]["logits"]) > 1e-2
