# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import logging

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.training.parameter_groups import parameter_groups
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.common.weights.loading import load_encoder
from bundles.common.weights.whole_network import load_whole_network
from bundles.pretraining.network import SwinPretrainer

NEW = (*(f"encoder{n}" for n in (1, 2, 3, 4, 10)), *(f"decoder{n}" for n in (5, 4, 3, 2, 1)), "out")
#: As `load_encoder` reports it: everything outside the encoder is new, and nothing of it is "missing".
FROM_ENCODER = {
    "missing": [],
    "modules": {name: {"from_file": 9 if name == "swinViT" else 0} for name in ("swinViT", *NEW)},
}


def rates(groups) -> dict[int, float]:
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


def test_each_stage_learns_slower_than_the_one_above_it(record):
    network = build_swin_unetr(record, out_channels=3)
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_decay=0.5, start=FROM_ENCODER)
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


@pytest.mark.parametrize(("start", "decay"), [(FROM_ENCODER, 0.5), (None, 1.0)])
def test_the_factor_of_the_transformer_multiplies_the_decay_and_applies_from_scratch_too(record, start, decay):
    network = build_swin_unetr(record, out_channels=3)
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_factor=4.0, encoder_lr_decay=0.5, start=start)
    rate, named = rates(groups), dict(network.named_parameters())
    assert len(rate) == len(named)
    found = {name: rate[id(parameter)] for name, parameter in named.items()}
    assert {found[name] for name in found if not name.startswith("swinViT.")} == {0.1}
    stages = ["patch_embed", "layers1", "layers2", "layers3", "layers4"]
    for k, stage in enumerate(reversed(stages), start=1):
        of_stage = [rate for name, rate in found.items() if name.startswith(f"swinViT.{stage}.")]
        assert of_stage and of_stage == pytest.approx([0.4 * decay**k] * len(of_stage))


def anew(network, start):
    groups = parameter_groups(network, learning_rate=0.1, start=start)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(parameter)] for group in groups if group["starts_anew"] for parameter in group["params"]}, groups


def test_what_starts_anew_has_groups_of_its_own(record):
    network = build_swin_unetr(record, out_channels=3)
    names = {name for name, _ in network.named_parameters()}
    assert anew(network, None)[0] == names
    assert anew(network, FROM_ENCODER)[0] == {name for name in names if not name.startswith("swinViT.")}
    fresh_input = {**FROM_ENCODER, "missing": ["swinViT.patch_embed.proj.weight"]}
    found, groups = anew(network, fresh_input)
    assert found == anew(network, FROM_ENCODER)[0] | {"swinViT.patch_embed.proj.weight"}
    assert [group["starts_anew"] for group in groups] == [False, True, False, False, False, False, True]


def test_of_a_whole_network_only_the_missing_tensors_start_anew(record, tmp_path):
    """The report is that of the loader itself."""
    network, other = (build_swin_unetr(record, out_channels=classes) for classes in (3, 2))
    save_atomically({"model": other.state_dict(), "encoder": record}, tmp_path / "model.pt")
    report = load_whole_network(network, str(tmp_path / "model.pt"))
    found, groups = anew(network, report)
    assert found == {"out.conv.conv.weight", "out.conv.conv.bias"}
    assert [group["starts_anew"] for group in groups] == [False] * 6 + [True]  # the log shows the last group


def test_the_loader_of_an_encoder_reports_the_decoder_as_new(record, tmp_path):
    network, other = (build_swin_unetr(record, out_channels=2) for _ in range(2))
    save_atomically({"model": other.state_dict(), "encoder": record}, tmp_path / "model.pt")
    report = load_encoder(network, str(tmp_path / "model.pt"))
    assert anew(network, report)[0] == anew(network, FROM_ENCODER)[0]


def test_processes_have_the_same_groups(record):
    """`DistributedDataParallel` puts ``module.`` before each name."""
    network = build_swin_unetr(record, out_channels=2)
    wrapped = torch.nn.ModuleDict({"module": network})
    one, other = (
        parameter_groups(each, learning_rate=0.1, encoder_lr_factor=2.0, start=FROM_ENCODER)
        for each in (network, wrapped)
    )
    assert rates(one) == rates(other) and len(one) == len(other) == 6


def test_the_heads_of_a_pre_training_are_the_rest(record):
    heads = {
        "reconstruction_head": "vae",
        "pooling": "mean",
    }
    network = SwinPretrainer(encoder=record, tasks=["inpainting", "contrast", "rotation"], heads=heads)
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_factor=3.0)
    rate = rates(groups)
    assert len(rate) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        assert rate[id(parameter)] == pytest.approx(0.3 if name.startswith("swinViT.") else 0.1)


@pytest.mark.parametrize("factor", [0, -1.0, True, float("inf"), "2"])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(InputError, match="--encoder_lr_factor .* must be a number above 0"):
        parameter_groups(torch.nn.Linear(1, 1), learning_rate=0.1, encoder_lr_factor=factor)


def test_an_encoder_from_scratch_is_not_held_back(record, caplog):
    caplog.set_level(logging.INFO)
    network = build_swin_unetr(record, out_channels=3)
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_decay=0.5, start=None)
    assert set(rates(groups).values()) == {0.1}
    assert "starts from scratch" in caplog.text


def test_a_frozen_encoder_does_not_move_and_the_decoder_does(record):
    torch.manual_seed(0)
    network = build_swin_unetr(record, out_channels=2, freeze_encoder=True, use_checkpoint=True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    groups = parameter_groups(network, learning_rate=0.1, encoder_lr_decay=1.0, start=FROM_ENCODER)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    network(torch.randn(1, 1, 64, 32, 32)).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any(name.startswith("swinViT.") for name in moved)
    assert {name for name, _ in network.named_parameters() if not name.startswith("swinViT.")} <= moved


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, True])
def test_a_decay_that_is_none_is_refused(record, decay):
    with pytest.raises(InputError, match="--encoder_lr_decay"):
        parameter_groups(torch.nn.Linear(1, 1), learning_rate=0.1, encoder_lr_decay=decay)


@pytest.mark.parametrize("rate", [-0.1, 1.0, True])
def test_a_drop_path_that_is_no_probability_is_refused(record, rate):
    with pytest.raises(InputError, match="--drop_path"):
        build_swin_unetr(record, out_channels=2, drop_path=rate)
