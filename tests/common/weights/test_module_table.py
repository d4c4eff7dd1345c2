# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest

from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.module_table import part_of


@pytest.mark.parametrize("use_v2", [False, True])
def test_the_parts_of_a_swin_unetr(record, use_v2):
    network = build_swin_unetr({**record, "use_v2": use_v2}, out_channels=2)
    parts = list(dict.fromkeys(part_of(name) for name, _ in network.named_parameters()))
    stages = ["patch_embed", "layers1", "layers2", "layers3", "layers4"]
    blocks = ["encoder1", "encoder2", "encoder3", "encoder4", "encoder10"]
    assert parts == [f"swinViT.{stage}" for stage in stages] + blocks + [f"decoder{n}" for n in (5, 4, 3, 2, 1)] + [
        "out"
    ]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("rotation_head.weight", "rotation_head"),
        ("conv.0.weight", "conv"),
        ("swinViT.layers2c.0.conv1.conv.weight", "swinViT.layers2"),
        ("swinViT.layers10.weight", "swinViT.layers10"),
        ("swinViTs.layers1.weight", "swinViTs"),
    ],
)
def test_the_part_of_a_tensor(name, part):
    assert part_of(name) == part
