# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A whole network of any source starts a training: all that fits is taken, and the rest is named."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights import merging_order
from bundles.common.weights.dialects import find_weights
from bundles.common.weights.encoder_record import resolve_encoder
from bundles.common.weights.loading import load_encoder
from bundles.common.weights.start_weights import load_start_weights
from bundles.common.weights.whole_network import OUTPUT, load_whole_network
from bundles.common.words import shown

X = torch.rand(1, 1, 64, 64, 32, generator=torch.Generator().manual_seed(3))
PRESET = {"feature_size": 12, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}


def source(record, *, seed=1, classes=32, **change):
    torch.manual_seed(seed)
    return build_swin_unetr(record | change, out_channels=classes).eval()


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def ssl(state):
    """MONAI's ssl_pretrained_weights.pth: one more level in the stages, mask token and norm, bare decoder names."""
    named = {}
    for name, tensor in state.items():
        bare = re.sub(r"^(layers\d)\.0\.", r"\1.0.0.", name.removeprefix("swinViT."))
        named[f"encoder.{bare}" if name.startswith("swinViT.") else name] = tensor
    extra = {"encoder.mask_token": torch.zeros(1, 1, 12), "encoder.norm.weight": torch.ones(192)}
    return {"model": named | extra | {"encoder.norm.bias": torch.zeros(192)}}


def suprem(state):
    """The Universal Model of SuPreM: no output layer, heads of its own, of which one comes first."""
    heads = {"module.organ_embedding": torch.zeros(32, 512)}
    heads |= {
        f"module.{name}.weight": torch.zeros(2, 2)
        for name in ("precls_conv.0", "GAP.0", "controller", "text_to_vision")
    }
    network = {f"module.backbone.{name}": tensor for name, tensor in state.items() if name not in OUTPUT}
    return {"net": heads | network, "optimizer": {"param_groups": []}, "scheduler": {}, "epoch": 2100}


def nnunet(prefix):
    """A trainer for Swin UNETR in a fork of nnU-Net."""
    return lambda state: {"network_weights": prefixed(prefix)(state), "trainer_name": "nnUNetTrainerSwinUNETR"}


# Name of the file (the table of known files says its merging), classes, changes of the record, and what is done to the
# state dict. Sources: docs/how-to/weights.md.
LAYOUTS = {
    "ours": ("ours.pt", 5, {}, lambda s: {"model": s}),
    "SuPreM": ("supervised_suprem_swinunetr_2100.pth", 32, {}, suprem),
    "VoComni": ("VoComni_B.pt", 21, {"use_v2": True}, lambda s: s),
    "VoComni, wrapped": ("VoComni_B.pt", 21, {"use_v2": True}, lambda s: {"state_dict": s}),
    "MONAI's self-supervised weights": ("ssl_pretrained_weights.pth", 1, {}, ssl),
    "BTCV of the authors": ("swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt", 14, {}, lambda s: {"state_dict": s}),
    "the zoo's model": ("model_swin_unetr_btcv_segmentation_v1.pt", 14, {}, lambda s: s),
    "BraTS fold of the authors": ("model.pt", 3, {}, lambda s: {"epoch": 299, "best_acc": 0.9, "state_dict": s}),
    "nnU-Net fork": ("checkpoint_final.pth", 7, {}, nnunet("")),
    "nnU-Net fork with a wrapper": ("checkpoint_final.pth", 7, {"num_heads": [3, 6, 6, 12]}, nnunet("model.")),
    "DDP": ("ddp.pt", 7, {}, lambda s: {"state_dict": prefixed("module.")(s)}),
}
KNOWN = (
    "SuPreM",
    "VoComni",
    "VoComni, wrapped",
    "MONAI's self-supervised weights",
    "BTCV of the authors",
    "the zoo's model",
)


@pytest.fixture(autouse=True)
def known_files_of_this_width(monkeypatch):
    """Let the table of known files describe networks of feature size 12, as those of these tests."""
    rows = ConfigParser.load_config_file(merging_order.CATALOGUE)
    for row in rows:
        row["encoder"] = {**row["encoder"], "feature_size": 12}
    monkeypatch.setattr(merging_order.ConfigParser, "load_config_file", lambda _: rows)


@pytest.fixture
def published(record):
    """The record of the published networks (depths, heads, window), at feature size 12."""
    return record | PRESET


def features(network):
    with torch.inference_mode():
        return network.swinViT(X, normalize=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_that_fits_is_taken_from_every_layout(tmp_path, published, layout):
    name, classes, change, lay_out = LAYOUTS[layout]
    published |= change | {"merging": "monai" if layout == "ours" else "legacy"}
    network = source(published, classes=classes)
    torch.save(lay_out(network.state_dict()), tmp_path / name)
    asked = {} if layout in KNOWN else {"merging": published["merging"]}
    resolved = resolve_encoder(asked=asked, preset={}, checkpoint=str(tmp_path / name))
    assert resolved == published
    torch.manual_seed(7)
    target = build_swin_unetr(resolved, out_channels=4).eval()
    before = {k: target.state_dict()[k].clone() for k in OUTPUT}
    report = load_whole_network(target, str(tmp_path / name))

    assert report["missing"] == sorted(OUTPUT) and ("classes" in report)
    table = report["modules"]
    assert list(table) == [
        "swinViT",
        *(f"encoder{i}" for i in (1, 2, 3, 4, 10)),
        *(f"decoder{i}" for i in (5, 4, 3, 2, 1)),
        "out",
        "all",
    ]
    assert all(table[module]["per_cent"] == 100.0 for module in table if module not in ("out", "all"))
    assert table["out"]["from_file"] == 0 and table["all"]["per_cent"] > 99.0
    assert table["all"]["parameters"] == sum(p.numel() for p in target.parameters())
    for mine, theirs in zip(features(target), features(network), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert all(torch.equal(target.state_dict()[k], before[k]) for k in OUTPUT)
    target.out = network.out
    with torch.inference_mode():
        torch.testing.assert_close(target(X), network(X), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [{}, {"rotation_head.weight": torch.zeros(4, 192), "conv.20.bias": torch.zeros(1)}])
def test_what_was_left_aside_is_said_once(tmp_path, record, caplog, heads):
    torch.save({"state_dict": source(record, classes=4).state_dict() | heads}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="bundles.common.weights.whole_network"):
        report = load_whole_network(source(record, seed=2, classes=4), str(tmp_path / "w.pt"))
    said = [line for line in caplog.messages if "left aside" in line]
    assert said == ([f"{tmp_path / 'w.pt'}: left aside: heads of a pre-training"] if heads else [])
    assert report["left_over"] == sorted(heads)


def test_an_encoder_with_skip_blocks_fills_what_it_has_if_the_decoder_is_named(tmp_path, published, caplog):
    """VoCo's heads: the Swin encoder and the blocks encoder1 to encoder10, without a decoder."""
    network = source(published | {"use_v2": True, "merging": "legacy"})
    state = {k: v for k, v in network.state_dict().items() if k.startswith(("swinViT.", "encoder"))}
    torch.save(state, tmp_path / "VoCo_B_SSL_head.pt")
    text = str(tmp_path / "VoCo_B_SSL_head.pt")
    target = source(resolve_encoder(asked={}, preset={}, checkpoint=text), seed=2, classes=4)
    with pytest.raises(
        InputError, match=r"fills 7\d\.\d% .*it lacks 20 tensors of decoder1, .*--allow_partial \"\['decoder1\.'"
    ):
        load_whole_network(target, text)
    table = load_whole_network(target, text, allow_partial=["decoder"])["modules"]
    assert [module for module in table if table[module]["from_file"] == 0] == [
        *(f"decoder{i}" for i in (5, 4, 3, 2, 1)),
        "out",
    ]


def test_a_network_of_nnssl_is_refused_with_the_reason(tmp_path):
    weights = {"encoder.stem.convs.0.conv.weight": torch.zeros(2, 1, 3, 3, 3)}
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": {}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="contains no Swin encoder.*file of nnssl.*its SwinUNETR is a proxy task"):
        find_weights(str(tmp_path / "w.pth"))


def test_with_the_same_classes_everything_is_taken(tmp_path, record):
    network, target = source(record, classes=3), source(record, seed=2, classes=3)
    torch.save({"model": network.state_dict()}, tmp_path / "w.pt")
    report = load_whole_network(target, str(tmp_path / "w.pt"))
    assert report["missing"] == [] and "classes" not in report and report["modules"]["all"]["per_cent"] == 100.0
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in target.state_dict().items())


def test_one_channel_into_several_keeps_the_response_to_equal_channels(tmp_path, record):
    network = source(record, classes=3)
    torch.save({"model": network.state_dict()}, tmp_path / "w.pt")
    target = source(record, seed=2, classes=3, in_channels=4)
    report = load_whole_network(target, str(tmp_path / "w.pt"), patch_embed="repeat")
    assert report["patch_embed"] == "1 to 4 channels: repeat" and report["missing"] == []
    with torch.inference_mode():
        torch.testing.assert_close(target(X.expand(-1, 4, -1, -1, -1)), network(X), atol=1e-5, rtol=1e-5)
    fresh = source(record, seed=2, classes=3, in_channels=4)
    report = load_whole_network(fresh, str(tmp_path / "w.pt"), patch_embed="fresh")
    assert [name.split(".")[0] for name in report["missing"]] == ["encoder1", "encoder1", "swinViT"]
    report = load_whole_network(source(record, classes=3), str(tmp_path / "w.pt"), patch_embed="fresh")
    assert len(report["missing"]) == 3 and report["patch_embed"] == "1 to 1 channels: fresh"
    with pytest.raises(InputError, match=r"swinViT\.patch_embed\.proj\.weight is \(12, 4, 2, 2, 2\) in the file"):
        torch.save({"model": fresh.state_dict()}, tmp_path / "four.pt")
        load_whole_network(target := source(record, classes=3, in_channels=2), str(tmp_path / "four.pt"))


def unknown_tensor(state):
    state["adapter.weight"] = torch.zeros(2)


def no_decoder_block(state):
    for name in [name for name in state if name.startswith("decoder5.")]:
        del state[name]


def other_shape(state):
    state["decoder1.conv_block.conv1.conv.weight"] = torch.zeros(1, 2, 3, 3, 3)


def encoder_alone(state):
    for name in [name for name in state if not name.startswith("swinViT.")]:
        del state[name]


def proxy_heads(state):
    encoder_alone(state)
    state["rotation_head.weight"] = torch.zeros(4, 96)


def nan(state):
    state["decoder2.conv_block.conv1.conv.weight"] = torch.full_like(
        state["decoder2.conv_block.conv1.conv.weight"], float("nan")
    )


def other_window(state):
    name = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    state[name] = state[name].flip(0)


def quantised(state):
    name = "decoder2.conv_block.conv1.conv.weight"
    state[name] = state[name].to(torch.int8)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            unknown_tensor,
            r"1 tensors without a place in Swin UNETR \(adapter\.weight\).*--allow_partial \"\['adapter\.'\]\"",
        ),
        (
            no_decoder_block,
            r"fills 7\d\.\d% of the network, less than 99%.*lacks \d+ tensors of decoder5 .*--allow_partial",
        ),
        (other_shape, r"decoder1\.conv_block\.conv1\.conv\.weight is \(1, 2, 3, 3, 3\) in the file"),
        (encoder_alone, r"holds an encoder, but no decoder: \d+% of the network. Use it as --pretrained_encoder\.$"),
        (proxy_heads, r"no decoder: \d+% .* --pretrained_encoder, or as --pretrained_model of swin_unetr_pretrain\.$"),
        (nan, r"1 with non-finite values \(decoder2\.conv_block\.conv1\.conv\.weight\)"),
        (other_window, "relative_position_index belongs to another window size"),
        (quantised, r"decoder2\.conv_block\.conv1\.conv\.weight has the type torch\.int8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_loaded(tmp_path, record, spoil, words):
    state = source(record, classes=3).state_dict()
    spoil(state)
    torch.save({"model": state}, tmp_path / "w.pt")
    target = source(record, seed=2, classes=3)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(InputError, match=words):
        load_whole_network(target, str(tmp_path / "w.pt"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "entry", "modules"),
    [
        (unknown_tensor, "adapter.", set()),
        (no_decoder_block, "decoder5.", {"decoder5"}),
        (other_shape, "decoder1.", {"decoder1"}),
    ],
)
def test_what_is_named_may_start_anew_or_be_left_aside(tmp_path, record, spoil, entry, modules):
    state = source(record, classes=3).state_dict()
    spoil(state)
    torch.save({"model": state}, tmp_path / "w.pt")
    target = source(record, seed=2, classes=3)
    report = load_whole_network(target, str(tmp_path / "w.pt"), allow_partial=[entry])
    assert {name.split(".")[0] for name in report["missing"]} == modules
    assert report["left_over"] == (["adapter.weight"] if spoil is unknown_tensor else [])
    with pytest.raises(InputError, match=r"--allow_partial 'nothing' does not match"):
        load_whole_network(target, str(tmp_path / "w.pt"), allow_partial=[entry, "nothing"])


def test_half_precision_is_converted_and_said(tmp_path, record, caplog):
    state = {k: v.half() if v.is_floating_point() else v for k, v in source(record, classes=3).state_dict().items()}
    torch.save({"model": state}, tmp_path / "w.pt")
    target = source(record, seed=2, classes=3)
    with caplog.at_level(logging.INFO):
        load_whole_network(target, str(tmp_path / "w.pt"))
    assert "weights of type float16 are converted to float32" in caplog.text
    assert torch.equal(target.state_dict()[OUTPUT[0]], state[OUTPUT[0]].float())


def test_an_encoder_says_what_it_leaves_aside_and_which_option_takes_it(tmp_path, record, caplog):
    torch.save({"model": source(record).state_dict()}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        report = load_encoder(source(record, seed=2, classes=3), str(tmp_path / "w.pt"))
    assert re.search(
        r"holds a whole Swin UNETR: 9\d% of it, the decoder, is left aside; --pretrained_model takes it", caplog.text
    )
    assert report["modules"]["swinViT"]["per_cent"] == 100.0 and report["modules"]["decoder5"]["from_file"] == 0
    assert re.search(r"\nmodule +from the file +new +parameters +%\nswinViT ", caplog.text)


@pytest.mark.parametrize("change", [{"window_size": 3}, {"depths": [1, 1, 1, 2]}, {"feature_size": 24}])
def test_another_network_than_the_files_is_refused_with_both_values(tmp_path, record, change):
    """Tables of relative positions are not interpolated: another window is another network."""
    torch.save({"model": source(record).state_dict(), "encoder": record}, tmp_path / "w.pt")
    (field, value), text = next(iter(change.items())), str(tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=re.escape(f"{field} is {shown(record[field])} in the file, {shown(value)} requested")
    ):
        resolve_encoder(asked=change, preset={}, checkpoint=text, patch_embed="repeat")


def test_a_training_starts_from_a_network_with_other_classes(tmp_path, record, caplog):
    torch.save({"model": source(record).state_dict(), "encoder": record}, tmp_path / "w.pt")
    target = source(record, seed=2, classes=3)
    with caplog.at_level(logging.INFO):
        report = load_start_weights(target, pretrained_encoder=None, pretrained_model=str(tmp_path / "w.pt"))
    assert report["classes"] == "32 in the file, 3 here: the output layer starts anew" and report["merging"] == "monai"
    assert "classes: 32 in the file, 3 here: the output layer starts anew" in caplog.text
