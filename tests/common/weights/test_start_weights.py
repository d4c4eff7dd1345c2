# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Start weights: options that name a weights file's contents are refused where there is no such file."""

from __future__ import annotations

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.start_weights import load_start_weights
from bundles.pretraining.network import SwinPretrainer


def test_partial_weights_without_a_file_are_refused(record):
    network = build_swin_unetr(record, out_channels=2)
    with pytest.raises(InputError, match=r"--allow_partial layers4 names what a weights file may lack, and no file"):
        load_start_weights(network, pretrained_encoder=None, pretrained_model=None, allow_partial=["layers4"])


def test_a_pre_training_network_is_never_partial(record, tmp_path):
    network = SwinPretrainer(encoder=record, tasks=["rotation"])
    file = tmp_path / "model.pt"
    torch.save({"model": network.state_dict()}, file)
    asked = {"pretrained_encoder": None, "pretrained_model": str(file), "merging": "monai"}
    with pytest.raises(InputError, match=r"--allow_partial conv: .*model.pt is read as a whole pre-training"):
        load_start_weights(network, **asked, allow_partial=["conv"])
    assert load_start_weights(network, **asked)["merging"] == "monai"
