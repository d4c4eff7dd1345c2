# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import logging

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.training.parameter_groups import parameter_groups


def rates(groups) -> dict[int, float]:
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


def test_each_stage_learns_slower_than_the_one_above_it(record):
    network = build_swin_unetr(record, out_channels=3)
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_decay=0.5, pretrained=True)
    rate = rates(groups)
    assert len(rate) == len(list(network.parameters()))  # every parameter once
    expected = {
        "swinViT.patch_embed.proj.weight": 0.1 / 32,
        "swinViT.layers1.0.blocks.0.attn.qkv.weight": 0.1 / 16,
        "swinViT.layers2.0.downsample.reduction.weight": 0.1 / 8,
        "swinViT.layers3.0.blocks.0.norm1.bias": 0.1 / 4,
        "swinViT.layers4.0.blocks.0.mlp.linear1.weight": 0.1 / 2,
        "encoder1.layer.conv1.conv.weight": 0.1,
        "out.conv.conv.bias": 0.1,
    }
    named = dict(network.named_parameters())
    assert {name: rate[id(named[name])] for name in expected} == pytest.approx(expected)
    assert groups[-1]["lr"] == 0.1  # the log shows the last group


def test_an_encoder_from_scratch_is_not_held_back(record, caplog):
    caplog.set_level(logging.INFO)
    network = build_swin_unetr(record, out_channels=3)
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_decay=0.5, pretrained=False)
    assert set(rates(groups).values()) == {0.1}
    assert "starts from scratch" in caplog.text


def test_a_frozen_encoder_does_not_move_and_the_decoder_does(record):
    torch.manual_seed(0)
    network = build_swin_unetr(record, out_channels=2, freeze_encoder=True, use_checkpoint=True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_decay=1.0, pretrained=True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    network(torch.randn(1, 1, 64, 32, 32)).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any(name.startswith("swinViT.") for name in moved)
    assert {name for name, _ in network.named_parameters() if not name.startswith("swinViT.")} <= moved


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, True])
def test_a_decay_that_is_none_is_refused(record, decay):
    with pytest.raises(InputError, match="--encoder_lr_decay"):
        parameter_groups(torch.nn.Linear(1, 1), learning_rate=0.1, encoder_lr_decay=decay, pretrained=True)


@pytest.mark.parametrize("rate", [-0.1, 1.0, True])
def test_a_drop_path_that_is_no_probability_is_refused(record, rate):
    with pytest.raises(InputError, match="--drop_path"):
        build_swin_unetr(record, out_channels=2, drop_path=rate)
