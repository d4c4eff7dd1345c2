# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The slow reference equals MONAI's Swin UNETR in float64, with either order of patch merging, and tells them apart."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR

from bundles.common.networks.patch_merging import LegacyPatchMerging

from .swin_unetr_1_4 import encoder_features, segmentation_logits

# MONAI's own "merging" is the order of its version, 1.5 or later here; the class brings back that of 1.4.
DOWNSAMPLE = {"monai": "merging", "legacy": LegacyPatchMerging}
HEADS = (3, 6, 12, 24)
# The stages of this crop work on 32x32x16, 16x16x8, 8x8x4 and 4x4x2 tokens. Windows of 7 need padding in the first two,
# are 7x7x4 and shifted along two axes in the third, 4x4x2 in the fourth; windows of 4 fit, and are 4x4x2 in the fourth.
CROP = (64, 64, 32)

NETWORKS = {
    "window 7": dict(feature_size=12, window_size=7, depths=(2, 2, 2, 2), in_channels=1, use_v2=False),
    "window 4": dict(feature_size=12, window_size=4, depths=(2, 2, 2, 2), in_channels=2, use_v2=False),
    "24 features, window 7, V2, unshifted": dict(
        feature_size=24, window_size=7, depths=(1, 1, 1, 1), in_channels=2, use_v2=True
    ),
    "24 features, window 4, V2": dict(feature_size=24, window_size=4, depths=(2, 2, 2, 2), in_channels=1, use_v2=True),
}


def monai_network(merging, **settings):
    """MONAI's network in float64, with weights that leave nothing at zero or one and scores that are not all alike."""
    generator = torch.Generator().manual_seed(0)
    net = SwinUNETR(out_channels=3, num_heads=HEADS, downsample=DOWNSAMPLE[merging], **settings).double().eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            if "norm" in name and name.endswith("weight"):
                drawn = 1 + 0.3 * drawn
            elif weight.ndim > 1 and "relative_position" not in name:
                drawn = drawn / weight[0].numel() ** 0.5
            weight.copy_(drawn)
    return net


def image(channels, shape, *, batch=1):
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def largest_difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()


def weights_of(net):
    """The parameters alone: the index that MONAI stores beside each table is the reference's to work out."""
    return {name: weight.detach() for name, weight in net.named_parameters()}


@pytest.mark.parametrize("merging", ["legacy", "monai"])
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
def test_features_of_every_stage_equal_monai(settings, merging):
    net, x = monai_network(merging, **settings), image(settings["in_channels"], CROP)
    with torch.no_grad():
        expected = net.swinViT(x, normalize=True)
        got = encoder_features(
            weights_of(net), x, num_heads=HEADS, window_size=settings["window_size"], merging=merging
        )
    assert len(got) == len(expected) == 5
    assert max(map(largest_difference, got, expected)) < 1e-10


@pytest.mark.parametrize("merging", ["legacy", "monai"])
def test_features_equal_monai_where_no_side_fits_patches_windows_or_merging(merging):
    settings = dict(feature_size=12, window_size=3, depths=(2, 1, 3, 1), in_channels=2, use_v2=True)
    net, x = monai_network(merging, **settings), image(2, (41, 34, 23), batch=2)
    with torch.no_grad():
        expected = net.swinViT(x, normalize=True)
        got = encoder_features(weights_of(net), x, num_heads=HEADS, window_size=3, merging=merging)
    assert max(map(largest_difference, got, expected)) < 1e-10


@pytest.mark.parametrize(
    ("name", "merging"),
    [
        ("window 7", "legacy"),
        ("window 4", "monai"),
        ("24 features, window 4, V2", "legacy"),
    ],
)
def test_logits_equal_monai(name, merging):
    settings = NETWORKS[name]
    net, x = monai_network(merging, **settings), image(settings["in_channels"], CROP)
    with torch.no_grad():
        expected = net(x)
        got = segmentation_logits(
            weights_of(net), x, num_heads=HEADS, window_size=settings["window_size"], merging=merging
        )
    assert largest_difference(got, expected) < 1e-10


def test_the_same_weights_give_other_features_and_logits_under_the_other_merging():
    settings = NETWORKS["window 4"]
    net, x = monai_network("monai", **settings), image(settings["in_channels"], CROP)
    state = weights_of(net)
    old, new = ({"num_heads": HEADS, "window_size": 4, "merging": merging} for merging in ("legacy", "monai"))
    with torch.no_grad():
        differences = map(largest_difference, encoder_features(state, x, **old), encoder_features(state, x, **new))
        embedded, *stages = differences
        logits = largest_difference(segmentation_logits(state, x, **old), segmentation_logits(state, x, **new))
    assert embedded == 0
    assert min(stages) > 1e-3 and logits > 1e-3


def test_arithmetic_is_done_in_the_dtype_of_the_weights():
    settings = NETWORKS["window 4"]
    net = monai_network("legacy", **settings)
    state = {name: weight.float() for name, weight in weights_of(net).items()}
    x = image(settings["in_channels"], (32, 32, 32))
    features = encoder_features(state, x, num_heads=HEADS, window_size=4)
    assert {feature.dtype for feature in features} == {torch.float32}
