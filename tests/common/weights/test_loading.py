# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A file fits the network tensor by tensor, or nothing of it is loaded."""

from __future__ import annotations

import logging

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_encoder, build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.common.weights.encoder_record import resolve_encoder
from bundles.common.weights.loading import encoder_state, fit_patch_embedding, load_encoder, load_model
from bundles.common.weights.start_weights import load_start_weights, start_checkpoint


@pytest.fixture
def build(record):
    def network(seed=0, **change):
        torch.manual_seed(seed)
        return build_swin_unetr(record | change, out_channels=3)

    return network


def copy_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "weights.pt")


def test_all_tensors_of_a_model_are_loaded(path, build):
    source, target = build(1), build(2)
    save_atomically({"model": source.state_dict(), "trained": {"steps": 7}}, path)
    report = load_model(target, path)
    assert equal(target.state_dict(), source.state_dict())
    buffers = [name for name in source.state_dict() if name.endswith("relative_position_index")]
    assert report.pop("modules")["all"]["per_cent"] == 100.0
    assert report == {
        **{"file": path, "dialect": ["in 'model'"], "missing": [], "left_over": []},
        "loaded": len(source.state_dict()) - len(buffers),
    }


def without(state):
    del state["out.conv.conv.bias"], state["swinViT.layers1.0.blocks.0.norm1.weight"]


def with_more(state):
    state["head.weight"] = torch.zeros(1)


def with_another_shape(state):
    state["out.conv.conv.weight"] = torch.zeros(4, 12, 1, 1, 1)


def with_another_window(state):
    name = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    state[name] = state[name].flip(0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without, "2 tensors missing .out.conv.conv.bias ... swinViT.layers1.0.blocks.0.norm1.weight"),
        (with_more, "1 that the network does not have .head.weight"),
        (
            with_another_shape,
            r"1 with a different shape .*4 x 12 x 1 x 1 x 1 in the file, 3 x 12 x 1 x 1 x 1 in the network",
        ),
        (with_another_window, "relative_position_index belongs to another window size"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_loaded(path, build, spoil, words):
    state = copy_of(build(1))
    spoil(state)
    save_atomically({"model": state}, path)
    network = build(2)
    before = copy_of(network)
    with pytest.raises(InputError, match=f"weights.pt does not fit the network: .*{words}.*Nothing was loaded"):
        load_model(network, path)
    assert equal(network.state_dict(), before)


def test_an_encoder_is_loaded_and_the_decoder_stays(path, build):
    source, target = build(1), build(2)
    decoder = {name: tensor.clone() for name, tensor in target.state_dict().items() if not name.startswith("swinViT.")}
    save_atomically({"state_dict": encoder_state(source)}, path)
    report = load_encoder(target, path)
    assert equal(encoder_state(target), encoder_state(source))
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in decoder.items())
    assert report["missing"] == report["left_over"] == []


def test_the_encoder_of_a_whole_network_is_taken_and_its_decoder_reported(path, build):
    source, target = build(1), build(2)
    save_atomically({"state_dict": {f"module.{name}": tensor for name, tensor in source.state_dict().items()}}, path)
    report = load_encoder(target, path)
    assert equal(encoder_state(target), encoder_state(source))
    assert "out.conv.conv.weight" in report["left_over"] and len(report["left_over"]) > 20
    assert not torch.equal(target.out.conv.conv.weight, source.out.conv.conv.weight)


def test_buffers_that_follow_from_the_window_may_be_left_out(path, build):
    source, target = build(1), build(2)
    state = {k: v for k, v in encoder_state(source).items() if not k.endswith("relative_position_index")}
    save_atomically({"state_dict": state}, path)
    load_encoder(target, path)
    assert equal(encoder_state(target), encoder_state(source))


def test_a_part_may_be_missing_only_where_it_is_named(path, build):
    source, target = build(1), build(2)
    state = {k: v for k, v in encoder_state(source).items() if not k.startswith("swinViT.layers4")}
    save_atomically({"state_dict": state}, path)
    before = copy_of(target)
    with pytest.raises(InputError, match="tensors missing .swinViT.layers4"):
        load_encoder(target, path)
    with pytest.raises(InputError, match="tensors missing .swinViT.layers4"):
        load_encoder(target, path, allow_partial=["layers3"])
    assert equal(target.state_dict(), before)
    report = load_encoder(target, path, allow_partial=["swinViT.layers4"])  # as in the network, or without its prefix
    assert report["missing"] and all(name.startswith("swinViT.layers4.") for name in report["missing"])
    assert torch.equal(
        target.swinViT.layers1[0].blocks[0].norm1.weight, source.swinViT.layers1[0].blocks[0].norm1.weight
    )
    assert torch.equal(
        target.state_dict()["swinViT.layers4.0.blocks.0.attn.qkv.weight"],
        before["swinViT.layers4.0.blocks.0.attn.qkv.weight"],
    )
    with pytest.raises(InputError, match="--allow_partial 'layer4' does not match the beginning of any tensor name"):
        load_encoder(target, path, allow_partial=["layer4", "layers4"])


def test_stages_that_may_be_missing_are_built_as_asked_for_or_as_the_preset_has_them(path, build, record):
    state = {k: v for k, v in encoder_state(build(depths=[2, 1, 1, 1])).items() if not k.startswith("swinViT.layers4")}
    save_atomically({"state_dict": state}, path)
    preset, asked = record | {"depths": [1, 1, 1, 3], "num_heads": [1, 2, 4, 6]}, {"merging": "legacy"}
    with pytest.raises(InputError, match="no layers4.0.blocks.0"):
        resolve_encoder(asked=asked, preset=preset, checkpoint=path)
    resolved = resolve_encoder(asked=asked, preset=preset, checkpoint=path, allow_partial=["layers4"])
    assert resolved == record | {"merging": "legacy", "depths": [2, 1, 1, 3], "num_heads": [1, 2, 4, 6]}
    load_encoder(build_swin_unetr(resolved, out_channels=2), path, allow_partial=["layers4"])


def test_one_channel_repeated_keeps_the_response_to_equal_channels(path, record):
    torch.manual_seed(1)
    one, four = build_encoder(record).double().eval(), build_encoder(record | {"in_channels": 4}).double().eval()
    save_atomically({"state_dict": {f"swinViT.{name}": tensor for name, tensor in one.state_dict().items()}}, path)
    report = load_encoder(torch.nn.ModuleDict({"swinViT": four}), path)
    assert report["patch_embed"] == "1 to 4 channels: repeat"
    x = torch.rand(1, 1, 64, 64, 32, dtype=torch.float64)
    for ours, theirs in zip(four(x.expand(-1, 4, -1, -1, -1).contiguous()), one(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weight = torch.rand(2, 1, 2, 2, 2)
    assert torch.equal(fit_patch_embedding(weight, 4)[:, 3], weight[:, 0] / 4)


def test_a_fresh_patch_embedding_is_left_as_it_is(path, build):
    source, target = build(1, in_channels=2), build(2, in_channels=3)
    save_atomically({"state_dict": encoder_state(source)}, path)
    before = target.swinViT.patch_embed.proj.weight.clone()
    with pytest.raises(InputError, match="1 with a different shape .first: swinViT.patch_embed.proj.weight"):
        load_encoder(target, path)  # two channels cannot be repeated for three
    report = load_encoder(target, path, patch_embed="fresh")
    assert torch.equal(target.swinViT.patch_embed.proj.weight, before)
    assert report["missing"] == ["swinViT.patch_embed.proj.bias", "swinViT.patch_embed.proj.weight"]
    save_atomically({"state_dict": encoder_state(build(1, in_channels=3))}, path)
    load_encoder(target, path, patch_embed="fresh")  # asked for, though the channels are equal
    assert torch.equal(target.swinViT.patch_embed.proj.weight, before)
    with pytest.raises(InputError, match="--patch_embed 'mean' is not one of repeat, fresh"):
        load_encoder(target, path, patch_embed="mean")


def test_channels_are_resolved_before_the_network_is_built(path, build, record):
    save_atomically({"state_dict": encoder_state(build()), "encoder": record}, path)
    asked = {"in_channels": 4}
    assert resolve_encoder(asked=asked, preset={}, checkpoint=path, patch_embed="repeat")["in_channels"] == 4
    with pytest.raises(InputError, match="in_channels is 1 in the file, 4 requested") as refused:
        resolve_encoder(asked=asked, preset={}, checkpoint=path)
    assert "patch_embed" not in str(refused.value)  # no option of an evaluation
    save_atomically({"state_dict": encoder_state(build(in_channels=2)), "encoder": record | {"in_channels": 2}}, path)
    with pytest.raises(InputError, match="in_channels is 2 in the file, 4 requested.*--patch_embed fresh"):
        resolve_encoder(asked=asked, preset={}, checkpoint=path, patch_embed="repeat")
    assert resolve_encoder(asked=asked, preset={}, checkpoint=path, patch_embed="fresh")["in_channels"] == 4


def test_a_file_that_says_its_merging_goes_into_no_other_network(path, build, record):
    save_atomically({"model": build().state_dict(), "encoder": record | {"merging": "legacy"}}, path)
    for load in (load_model, load_encoder):
        with pytest.raises(InputError, match="needs patch merging legacy, but the network was built with PatchMerging"):
            load(build(), path)
        load(build(merging="legacy"), path)


def test_weights_that_are_not_finite_are_refused(path, build):
    state = copy_of(build())
    name = "swinViT.layers1.0.blocks.0.norm1.weight"
    for value in (float("nan"), 1e39):  # 1e39 is infinite in float32, the network's type
        state[name] = state[name].double()
        state[name][3] = value
        save_atomically({"model": state}, path)
        with pytest.raises(InputError, match=f"1 with non-finite values .{name}"):
            load_model(build(), path)


def test_what_the_file_has_and_the_preset_has_not_is_said(path, build, record, caplog):
    save_atomically({"state_dict": encoder_state(build()), "encoder": record}, path)
    with caplog.at_level(logging.INFO):
        resolve_encoder(asked={}, preset=record | {"feature_size": 48}, checkpoint=path)
    assert "feature_size 12, as in the file (the preset has 48)" in caplog.text


def test_missing_stages_are_those_of_the_files_own_record_first(path, build, record):
    state = {k: v for k, v in encoder_state(build()).items() if not k.startswith("swinViT.layers4")}
    save_atomically({"state_dict": state, "encoder": record}, path)
    resolved = resolve_encoder(
        asked={}, preset=record | {"depths": [2, 2, 2, 2]}, checkpoint=path, allow_partial=["layers4"]
    )
    assert resolved == record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_size": 24, "num_heads": [3, 6, 12, 24]}, "feature_size is 24 in the file, 12 requested"),
        ({"depths": [2, 1, 1, 1]}, r"depths is 2, 1, 1, 1 in the file, 1, 1, 1, 1 requested"),
        ({"window_size": 7}, "window_size is 7 in the file, 4 requested"),
    ],
)
def test_another_architecture_is_refused_with_the_difference(path, build, record, change, words):
    save_atomically({"state_dict": encoder_state(build(**change))}, path)
    asked = {name: record[name] for name in ("feature_size", "depths", "window_size")} | {"merging": "legacy"}
    with pytest.raises(InputError, match=words):
        resolve_encoder(asked=asked, preset=record, checkpoint=path)


@pytest.mark.parametrize(
    ("expected", "warned"),
    [({"spacing": (1.5, 1.5, 2.0)}, False), ({"spacing": [1, 1, 1]}, True), ({"unknown": 3}, False)],
)
def test_a_difference_to_the_training_is_warned_of(path, build, caplog, expected, warned):
    save_atomically({"model": build().state_dict(), "trained": {"spacing": [1.5, 1.5, 2.0]}}, path)
    with caplog.at_level(logging.WARNING):
        load_model(build(), path, expected=expected)
    assert ("was trained with spacing 1.5, 1.5, 2.0; this run uses 1, 1, 1" in caplog.text) == warned


def test_the_start_is_an_encoder_or_a_model_or_nothing(path, build, record):
    assert load_start_weights(build(), pretrained_encoder=None, pretrained_model=None) is None
    save_atomically({"model": build(1).state_dict()}, path)
    target = build(2)
    with pytest.raises(InputError, match="--merging legacy"):
        load_start_weights(target, pretrained_encoder=path, pretrained_model=None)
    save_atomically({"model": build(1).state_dict(), "encoder": record}, path)
    report = load_start_weights(target, pretrained_encoder=path, pretrained_model=None)
    assert report["left_over"] and report["file"] == path
    assert (report["merging"], report["merging_said_by"]) == ("monai", "its own encoder record")
    assert load_start_weights(target, pretrained_encoder=None, pretrained_model=path)["left_over"] == []
    with pytest.raises(InputError, match="exclude each other"):
        start_checkpoint("a.pt", "b.pt")
    with pytest.raises(InputError, match="--pretrained_model a.pt, b.pt: a training starts from one file"):
        start_checkpoint(None, ["a.pt", "b.pt"])


def test_the_table_by_module_is_for_weights_of_another_network(path, build, caplog):
    """It says which parts came from the file; of a whole network, all did."""
    save_atomically({"model": build().state_dict()}, path)
    with caplog.at_level(logging.INFO):
        load_model(build(1), path)
        assert "weights by module" not in caplog.text
        load_encoder(build(2), path)
        assert "weights by module" in caplog.text


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("swinViT.", "holds an encoder alone .*\\(like encoder.pt\\).*--pretrained_encoder"),
        (
            ("swinViT.", "encoder", "decoder"),
            "holds encoder and decoder of a pre-trained network.*\\(like network.pt\\).*--pretrained_model",
        ),
    ],
)
def test_a_pre_trained_network_is_no_trained_model(path, build, record, kept, words):
    state = {name: tensor for name, tensor in build().state_dict().items() if name.startswith(kept)}
    save_atomically({"model": state, "encoder": record}, path)
    with pytest.raises(InputError, match=words):
        load_model(build(1), path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_size": 0}, "--feature_size 0 must be a multiple of 12"),
        ({"feature_size": -12}, "--feature_size -12 must be a multiple of 12"),
        ({"feature_size": 16, "num_heads": [1, 2, 4, 8]}, "--feature_size 16 must be a multiple of 12"),
        ({"window_size": 0}, "--window_size 0 must be a whole number, 1 or more, at most 32"),
        ({"window_size": 100}, "--window_size 100 must be a whole number, 1 or more, at most 32"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_refused(record, change, words):
    with pytest.raises(InputError, match=words):
        resolve_encoder(asked=change, preset=record, checkpoint=None)
