# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights of MONAI 1.4, in every layout in which they go round, compute here what they computed there; without care they do not."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR

from bundles.common.networks.swin_unetr import build_encoder, build_swin_unetr
from bundles.common.weights.encoder_record import read_record
from bundles.common.weights.loading import load_encoder, load_model

from ..weights.test_dialects import LAYOUTS
from .swin_unetr_1_4 import encoder_features, segmentation_logits

WINDOW, HEADS = 4, (1, 2, 4, 8)
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def published():
    """A state dict in float64 with nothing at zero or one, an image, and what MONAI 1.4 made of it."""
    generator = torch.Generator().manual_seed(0)
    network = SwinUNETR(1, 3, feature_size=12, depths=(2, 1, 1, 1), num_heads=HEADS, window_size=WINDOW).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    image = torch.rand(1, 1, 64, 64, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        features = encoder_features(state, image, num_heads=HEADS, window_size=WINDOW, merging="legacy")
        logits = segmentation_logits(state, image, num_heads=HEADS, window_size=WINDOW, merging="legacy")
    return state, image, features, logits


def difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_and_logits_in_every_layout(tmp_path, published, layout):
    state, image, features, logits = published
    lay_out, has_decoder = LAYOUTS[layout]
    path = str(tmp_path / "weights.pt")
    torch.save(lay_out(state), path)
    record = read_record(path, merging="legacy")
    encoder = torch.nn.ModuleDict({"swinViT": build_encoder(record).double()}).eval()
    load_encoder(encoder, path)
    with torch.no_grad():
        for ours, theirs in zip(encoder["swinViT"](image), features, strict=True):
            assert difference(ours, theirs) < TOLERANCE
    if has_decoder is True:
        network = build_swin_unetr(record, out_channels=3).double().eval()
        load_model(network, path)
        with torch.no_grad():
            assert difference(network(image), logits) < TOLERANCE


def test_the_silent_error_is_real(published):
    """`SwinUNETR` of this MONAI takes the same weights with ``strict=True`` and computes something else."""
    state, image, features, logits = published
    network = SwinUNETR(1, 3, feature_size=12, depths=(2, 1, 1, 1), num_heads=HEADS, window_size=WINDOW).double().eval()
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert difference(network(image), logits) > 1e-2
        assert difference(network.swinViT(image)[0], features[0]) < TOLERANCE  # before the first merging all is well
        assert difference(network.swinViT(image)[4], features[4]) > 1e-2


def test_a_traced_network_keeps_its_merging(published):
    state, image, _, logits = published
    record = {"in_channels": 1, "feature_size": 12, "depths": [2, 1, 1, 1], "num_heads": list(HEADS)}
    record |= {"window_size": WINDOW, "patch_size": 2, "merging": "legacy", "use_v2": False}
    network = build_swin_unetr(record, out_channels=3).double().eval()
    network.load_state_dict(state)
    with torch.no_grad():
        traced = torch.jit.trace(network, image, check_trace=False)
        assert difference(traced(image), logits) < TOLERANCE
