# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Whatever a file is wrapped in and its tensors are called, the same weights come out, or an error that says what is there."""

from __future__ import annotations

import re

import numpy as np
import pytest
import safetensors.torch
import torch

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.dialects import ANCHOR, describe_encoder, find_weights, official_layout
from bundles.common.weights.loading import encoder_state


@pytest.fixture
def network(record):
    torch.manual_seed(0)
    return build_swin_unetr(record, out_channels=3)


def renamed(state, old, new):
    return {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in state.items()}


def bare(state):
    return {name.removeprefix("swinViT."): tensor for name, tensor in state.items() if name.startswith("swinViT.")}


def with_prefix(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_out(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("out.")}


def disruptive_autoencoder(state):
    """Names of the file that MONAI's `filter_swinunetr` is for: one more level in the stages, and things of its own."""
    state = {re.sub(r"^(layers\d)\.0\.", r"\1.0.0.", name): tensor for name, tensor in state.items()}
    return with_prefix(state, "encoder.") | {"encoder.mask_token": torch.zeros(1), "encoder.norm.bias": torch.zeros(1)}


# What is done to the state dict of a whole network, and whether the decoder is still there.
LAYOUTS = {
    "as MONAI saves it": (lambda s: s, True),
    "DDP": (lambda s: {"state_dict": with_prefix(s, "module.")}, True),
    "DeepSpeed": (lambda s: {"model": with_prefix(s, "_forward_module.")}, True),
    "DDP of a wrapper": (lambda s: {"net": with_prefix(s, "module.backbone.")}, True),
    "swin_vit": (lambda s: {"state_dict": renamed(s, "swinViT.", "swin_vit.")}, True),
    "training checkpoint": (lambda s: {"network": s, "optimizer": {}, "step": 3}, True),
    "beside other tensors": (lambda s: {"state_dict": s, "mean": torch.zeros(1)}, True),
    "wrapped twice": (lambda s: {"state_dict": {"model": s}, "epoch": 1}, True),
    "wrapped three times": (lambda s: {"run": {"state_dict": {"model": s}}}, True),
    "model_swinvit.pt": (lambda s: {"state_dict": official_layout(bare_encoder(s))}, False),
    "bare": (bare, False),
    "bare fc1": (lambda s: {k.replace("mlp.linear", "mlp.fc"): v for k, v in bare(s).items()}, False),
    "for MONAI's filter_swinunetr": (lambda s: {"model": disruptive_autoencoder(bare(s)), "optimizer": {}}, False),
    "encoder.": (lambda s: with_prefix(bare(s), "encoder."), False),
    "SuPreM": (
        lambda s: {
            "net": with_prefix(without_out(s), "module.backbone."),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
            "epoch": 9,
        },
        "no out",
    ),
    "top-level teacher": (lambda s: {"teacher": with_prefix(bare(s), "backbone."), "epoch": 1}, False),
    "DeepSpeed's module": (lambda s: {"module": s, "ds_version": "0.9"}, True),
    "configuration in model": (lambda s: {"model": {"name": "swin"}, "network_weights": s}, True),
    "teacher": (lambda s: {"state_dict": with_prefix(bare(s), "teacher.backbone.")}, False),
    "student": (lambda s: {"state_dict": with_prefix(s, "student.")}, True),
}


def bare_encoder(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("swinViT.")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_of_the_network_in_every_layout(tmp_path, network, layout):
    lay_out, has_decoder = LAYOUTS[layout]
    torch.save(lay_out(network.state_dict()), tmp_path / "w.pt")
    found = find_weights(tmp_path / "w.pt")
    expected = encoder_state(network)
    assert found.encoder.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.encoder.items())
    rest = {name for name in network.state_dict() if name not in expected} if has_decoder else set()
    if has_decoder == "no out":
        rest = {name for name in rest if not name.startswith("out.")}
    own = {"encoder.mask_token", "encoder.norm.bias"} if "filter" in layout else set()
    assert {name.removeprefix("encoder.") for name in found.rest} == {
        name.removeprefix("encoder.") for name in rest | own
    }


def test_what_was_recognised_is_said(tmp_path, network):
    torch.save({"state_dict": official_layout(encoder_state(network))}, tmp_path / "w.pt")
    assert find_weights(tmp_path / "w.pt").dialect == ("in 'state_dict'", "prefix 'module.'", "mlp.fc1/fc2")
    torch.save(network.state_dict(), tmp_path / "w.pt")
    assert find_weights(tmp_path / "w.pt").dialect == ()


def test_heads_of_a_pre_training_are_left_over_under_their_names(tmp_path, network):
    state = with_prefix(encoder_state(network), "module.")
    state |= {"module.rotation_head.weight": torch.zeros(4, 2), "module.conv.20.bias": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    found = find_weights(tmp_path / "w.pt")
    assert set(found.rest) == {"rotation_head.weight", "conv.20.bias"}
    # the released encoder's names are bare behind module.: heads beside them are no encoder's either
    bare_state = {"module." + name: tensor for name, tensor in bare(encoder_state(network)).items()}
    torch.save({"state_dict": bare_state | {"module.conv.20.bias": torch.zeros(1)}}, tmp_path / "w.pt")
    found = find_weights(tmp_path / "w.pt")
    assert len(found.encoder) == len(bare_state) and set(found.rest) == {"conv.20.bias"}


def test_entries_beside_the_weights_are_kept(tmp_path, network, record):
    torch.save({"model": network.state_dict(), "encoder": record, "trained": {"steps": 7}}, tmp_path / "w.pt")
    assert find_weights(tmp_path / "w.pt").content == {"encoder": record, "trained": {"steps": 7}}


def test_numbers_of_numpy_beside_the_weights_do_no_harm(tmp_path, network):
    beside = {"best_acc": np.float64(0.8), "epoch": np.int64(3), "lr": np.float32(0.1)}
    torch.save({"state_dict": network.state_dict(), **beside}, tmp_path / "w.pt")
    assert find_weights(tmp_path / "w.pt").content["best_acc"] == 0.8


def test_safetensors(tmp_path, network):
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    found = find_weights(tmp_path / "w.safetensors")
    assert {**found.encoder, **found.rest}.keys() == state.keys()
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="w.safetensors cannot be read"):
        find_weights(tmp_path / "w.safetensors")


def test_two_encoders_are_told_apart_by_the_user(tmp_path, network):
    teacher = with_prefix(bare(network.state_dict()), "teacher.backbone.")
    student = {name.replace("teacher", "student"): tensor + 1 for name, tensor in teacher.items()}
    torch.save({"state_dict": teacher | student}, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match="2 encoders, under 'student.backbone.', 'teacher.backbone.'.*--weights_prefix"
    ):
        find_weights(tmp_path / "w.pt")
    found = find_weights(tmp_path / "w.pt", prefix="teacher.backbone.")
    expected = encoder_state(network)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.encoder.items())
    with pytest.raises(InputError, match="no encoder under the prefix 'x.'; its prefixes: 'student.backbone.'"):
        find_weights(tmp_path / "w.pt", prefix="x.")


def test_two_encoders_side_by_side_are_told_apart_too(tmp_path, network):
    state = bare(network.state_dict())
    torch.save({"student": state, "teacher": {k: v + 1 for k, v in state.items()}, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="under 'student.', 'teacher.'"):
        find_weights(tmp_path / "w.pt")
    found = find_weights(tmp_path / "w.pt", prefix="student.")
    assert all(torch.equal(tensor, state[name.removeprefix("swinViT.")]) for name, tensor in found.encoder.items())


def test_files_without_a_swin_encoder_are_refused_with_what_they_hold(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}}, tmp_path / "resnet.pt")
    with pytest.raises(
        InputError, match="resnet.pt has no tensor 'patch_embed.proj.weight'.*Found: state_dict, conv1.weight, fc.bias"
    ):
        find_weights(tmp_path / "resnet.pt")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "log.pt")
    with pytest.raises(InputError, match="log.pt has no tensor.*Found: epoch, optimizer"):
        find_weights(tmp_path / "log.pt")
    torch.save({"a": {"b": {"c": {"d": {ANCHOR: torch.zeros(1)}}}}}, tmp_path / "deep.pt")
    with pytest.raises(InputError, match="deep.pt has no tensor.*Found: a, b"):
        find_weights(tmp_path / "deep.pt")
    torch.save({"network_weights": {}, "nnssl_adaptation_plan": {}}, tmp_path / "nnssl.pt")
    with pytest.raises(InputError, match="Found: network_weights, nnssl_adaptation_plan. It is a file of nnssl"):
        find_weights(tmp_path / "nnssl.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="list.pt has no tensor.*Found: list"):
        find_weights(tmp_path / "list.pt")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"feature_size": 24, "num_heads": [3, 6, 12, 24]},
        {"window_size": 7},
        {"use_v2": True},
        {"in_channels": 4},
        {"depths": [2, 1, 2, 1]},
    ],
)
def test_the_encoder_is_described_by_its_tensors(tmp_path, record, change):
    expected = record | change
    torch.save(encoder_state(build_swin_unetr(expected, out_channels=2)), tmp_path / "w.pt")
    described = describe_encoder(find_weights(tmp_path / "w.pt"))
    assert described == {name: value for name, value in expected.items() if name != "merging"}


def test_a_later_stage_that_the_file_lacks_is_as_told_but_not_the_first(tmp_path, record):
    state = encoder_state(build_swin_unetr(record, out_channels=2))
    otherwise = {"depths": [3, 3, 3, 3], "num_heads": [3, 3, 3, 3]}

    def described(without):
        torch.save({k: v for k, v in state.items() if f".layers{without}." not in k}, tmp_path / "w.pt")
        return describe_encoder(find_weights(tmp_path / "w.pt"), otherwise=otherwise)

    assert described(without=2)["depths"] == [1, 3, 1, 1] and described(without=4)["num_heads"] == [1, 2, 4, 3]
    with pytest.raises(InputError, match="its encoder has no layers1.0.blocks.0.attn.relative_position_bias_table"):
        described(without=1)


def test_an_encoder_of_another_kind_is_refused(tmp_path):
    torch.save({"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4), "layers.0.x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match="w.pt: its encoder has no layers1.0.blocks.0.attn.relative_position_bias_table"
    ):
        describe_encoder(find_weights(tmp_path / "w.pt"))
