# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights go from any layout into ours and into the official one, to the bit, and say what they are on the way."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import load_checkpoint_file, save_atomically
from bundles.common.weights.encoder_record import read_record
from bundles.common.weights.loading import encoder_state
from bundles.pretraining.convert import convert


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def encoder(record):
    torch.manual_seed(0)
    return encoder_state(build_swin_unetr(record, out_channels=2))


@pytest.mark.parametrize("merging", ["monai", "legacy"])
def test_ours_to_official_to_ours_is_equal_to_the_bit(tmp_path, record, encoder, merging):
    ours, official, back = (str(tmp_path / name) for name in ("encoder.pt", "model_swinvit.pt", "back.pt"))
    record = record | {"merging": merging}
    save_atomically({"state_dict": encoder, "encoder": record, "trained": {"steps": 5}}, ours)
    convert(source=ours, target=official, layout="official")
    convert(source=official, target=back)
    content = load_checkpoint_file(back)
    assert equal(content["state_dict"], encoder)
    assert content["encoder"] == read_record(official) == record  # whatever a file of that name usually is
    assert content["trained"] == {"steps": 5, "converted_from": "model_swinvit.pt"}


def test_monai_reads_the_official_layout(tmp_path, record, encoder):
    save_atomically({"state_dict": encoder, "encoder": record}, tmp_path / "encoder.pt")
    convert(source=str(tmp_path / "encoder.pt"), target=str(tmp_path / "official.pt"), layout="official")
    network = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)
    network.load_from(torch.load(tmp_path / "official.pt", weights_only=True))
    assert equal(encoder_state(network), encoder)


def test_the_official_layout_of_new_weights_is_warned_of(tmp_path, record, encoder, caplog):
    for merging, warned in (("monai", True), ("legacy", False)):
        caplog.clear()
        save_atomically({"state_dict": encoder, "encoder": record | {"merging": merging}}, tmp_path / "encoder.pt")
        convert(source=str(tmp_path / "encoder.pt"), target=str(tmp_path / "official.pt"), layout="official")
        assert ("MONAI 1.4 or older" in caplog.text) == warned


def test_the_table_says_what_was_found(tmp_path, record, capsys):
    whole = build_swin_unetr(record, out_channels=2).state_dict()
    kept = {f"module.{k}": v for k, v in whole.items() if not k.endswith("relative_position_index")}
    save_atomically({"state_dict": kept}, tmp_path / "whole.pt")
    shown = convert(source=str(tmp_path / "whole.pt"), target=str(tmp_path / "encoder.pt"), merging="legacy")
    assert shown["recognised"] == "in 'state_dict', prefix 'module.swinViT.'"
    assert shown["merging"] == "legacy, according to --merging"
    assert "4 of them computed from the window" in shown["tensors"]
    assert shown["unused"].startswith(f"{len(whole) - len(encoder_state_names(whole))}: decoder")
    assert "feature_size 12" in capsys.readouterr().out


def encoder_state_names(state):
    return [name for name in state if name.startswith("swinViT.")]


def test_an_incomplete_encoder_is_refused_and_nothing_is_written(tmp_path, record, encoder):
    del encoder["swinViT.layers2.0.blocks.0.attn.proj.bias"]
    save_atomically({"state_dict": encoder, "encoder": record}, tmp_path / "encoder.pt")
    with pytest.raises(
        InputError, match="lacks 1 tensors of its encoder, such as swinViT.layers2.0.blocks.0.attn.proj.bias"
    ):
        convert(source=str(tmp_path / "encoder.pt"), target=str(tmp_path / "target.pt"))
    assert not (tmp_path / "target.pt").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("patch_embed.proj.bias", lambda bias: bias / 0, "non-finite values .swinViT.patch_embed.proj.bias"),
        ("layers1.0.blocks.0.attn.relative_position_index", lambda index: index.flip(0), "belongs to another window"),
    ],
)
def test_a_bad_source_is_named_and_replaces_no_good_target(tmp_path, record, encoder, name, change, words):
    encoder[f"swinViT.{name}"] = change(encoder[f"swinViT.{name}"])
    save_atomically({"state_dict": encoder, "encoder": record}, tmp_path / "bad.pt")
    (tmp_path / "good.pt").write_text("a good file")
    with pytest.raises(InputError, match=f"bad.pt does not fit the network: .*{words}"):
        convert(source=str(tmp_path / "bad.pt"), target=str(tmp_path / "good.pt"))
    assert (tmp_path / "good.pt").read_text() == "a good file"


def test_the_source_is_never_overwritten(tmp_path, record, encoder):
    save_atomically({"state_dict": encoder, "encoder": record}, tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="is the source itself"):
        convert(source=str(tmp_path / "encoder.pt"), target=f"{tmp_path}/../{tmp_path.name}/encoder.pt")
    with pytest.raises(InputError, match="--layout 'nnunet' is not one of encoder, official"):
        convert(source=str(tmp_path / "encoder.pt"), target=str(tmp_path / "x.pt"), layout="nnunet")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"source": ["a.pt", "b.pt"]}, "--source ['a.pt', 'b.pt'] must be a path"),
        ({"target": None}, "--target None must be a path"),
        ({"target": "{folder}"}, "is a folder: pass the file to write, such as"),
        ({"target": "{folder}/file/encoder.pt"}, "cannot be written: "),
    ],
)
def test_a_source_or_target_that_is_not_a_file_is_refused(tmp_path, record, encoder, asked, words):
    source = str(tmp_path / "source.pt")
    save_atomically({"state_dict": encoder, "encoder": record}, source)
    (tmp_path / "file").touch()
    asked = {key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in asked.items()}
    with pytest.raises(InputError) as refused:
        convert(**{"source": source, "target": str(tmp_path / "t.pt"), "layout": "encoder", **asked})
    assert words in str(refused.value)


def test_an_encoder_with_use_v2_has_no_official_layout(tmp_path, record):
    record = record | {"use_v2": True}
    state = encoder_state(build_swin_unetr(record, out_channels=2))
    save_atomically({"state_dict": state, "encoder": record}, tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="use_v2: SwinUNETR.load_from would ignore its layers1c"):
        convert(source=str(tmp_path / "encoder.pt"), target=str(tmp_path / "x.pt"), layout="official")
    convert(source=str(tmp_path / "encoder.pt"), target=str(tmp_path / "x.pt"))
