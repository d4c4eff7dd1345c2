# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which encoder is built: what was asked for, else what the checkpoint holds, else the preset, and never a mixture."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import PatchMerging

from bundles.common.errors import InputError
from bundles.common.networks.patch_merging import LegacyPatchMerging
from bundles.common.networks.swin_unetr import build_encoder, build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.common.weights.encoder_record import FIELDS, read_record, resolve_encoder
from bundles.common.weights.loading import encoder_state

PRESET = {
    "feature_size": 48,
    "depths": [2, 2, 2, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "learning_rate": 1e-4,
}


def resolve(asked=None, preset=PRESET, checkpoint=None, **options):
    return resolve_encoder(asked=asked or {}, preset=preset, checkpoint=checkpoint, **options)


@pytest.fixture
def checkpoint(tmp_path, record):
    path = tmp_path / "encoder.pt"
    record = record | {"merging": "legacy"}
    state = encoder_state(build_swin_unetr(record, out_channels=2))
    save_atomically({"state_dict": state, "encoder": record | {"depths": (1, 1, 1, 1)}}, path)
    return str(path)


def test_the_preset_decides_where_nothing_was_asked_for():
    assert resolve({"in_channels": None, "feature_size": None}) == {
        "in_channels": 1,
        "feature_size": 48,
        "depths": [2, 2, 2, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "patch_size": 2,
        "merging": "monai",
        "use_v2": False,
    }


def test_what_was_asked_for_comes_before_the_preset():
    resolved = resolve({"in_channels": 4, "feature_size": 24, "depths": (2, 2, 6, 2), "merging": "legacy"})
    assert (resolved["in_channels"], resolved["feature_size"], resolved["merging"]) == (4, 24, "legacy")
    assert resolved["depths"] == [2, 2, 6, 2] and resolved["window_size"] == 7


def test_the_checkpoint_comes_before_the_preset(checkpoint, record):
    assert resolve(checkpoint=checkpoint) == record | {"merging": "legacy"}


def test_asking_for_what_the_checkpoint_holds_is_fine_as_list_or_tuple(checkpoint, record):
    asked = {"depths": (1, 1, 1, 1), "num_heads": [1, 2, 4, 8], "merging": "legacy"}
    assert resolve(asked, checkpoint=checkpoint) == record | {"merging": "legacy"}


def test_asking_for_something_else_than_the_checkpoint_holds_is_refused_with_both_values(checkpoint):
    with pytest.raises(InputError) as caught:
        resolve({"feature_size": 48, "window_size": 4, "depths": [2, 1, 1, 1]}, checkpoint=checkpoint)
    said = str(caught.value)
    assert checkpoint in said
    assert "feature_size is 12 in the file, 48 requested" in said
    assert "depths is 1, 1, 1, 1 in the file, 2, 1, 1, 1 requested" in said
    assert "window_size" not in said


def test_an_absent_checkpoint_is_refused_unless_it_is_optional(tmp_path, checkpoint):
    absent = str(tmp_path / "none.pt")
    with pytest.raises(InputError, match="none.pt"):
        resolve(checkpoint=absent)
    assert resolve(checkpoint=absent, optional=True) == resolve()
    assert resolve(checkpoint=checkpoint, optional=True)["feature_size"] == 12


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"embed_dim": 48}, "unknown encoder fields embed_dim; known fields: in_channels, feature_size"),
        ({"merging": "old"}, "merging 'old' is not one of monai, legacy"),
        ({"depths": [2, 2, 2]}, r"depths \[2, 2, 2\] must have four numbers"),
        ({"num_heads": [3, 6, 12]}, r"num_heads \[3, 6, 12\] must have four numbers"),
        ({"num_heads": [3, 6, 12, 23]}, r"stage 4 384 channels, which 23 heads .* do not divide"),
        ({"feature_size": 30}, "feature_size 30 must be a multiple of 12"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(asked, words):
    with pytest.raises(InputError, match=words):
        resolve(asked)


def test_a_field_that_nobody_sets_is_named():
    with pytest.raises(InputError, match="neither the preset nor the command line sets depths, window_size"):
        resolve(preset={"feature_size": 48, "num_heads": [3, 6, 12, 24]})


def test_the_record_of_a_file_has_plain_lists_and_the_fields_alone(checkpoint, record):
    assert read_record(checkpoint) == record | {"merging": "legacy"}
    assert tuple(read_record(checkpoint)) == FIELDS
    assert read_record(None) is None


@pytest.mark.parametrize(
    "change", [{}, {"in_channels": 4}, {"use_v2": True}, {"window_size": 3, "depths": [2, 1, 1, 1]}]
)
def test_the_encoder_alone_has_the_names_and_shapes_of_the_one_in_swin_unetr(record, change):
    record = record | change
    alone = {k: v.shape for k, v in build_encoder(record).state_dict().items()}
    network = build_swin_unetr(record, out_channels=3)
    assert isinstance(network, SwinUNETR)
    assert {k: v.shape for k, v in network.swinViT.state_dict().items()} == alone
    assert network.out(torch.zeros(1, 12, 2, 2, 2)).shape[1] == 3


def test_the_encoder_alone_computes_what_the_one_in_swin_unetr_computes(record):
    torch.manual_seed(0)
    network = build_swin_unetr(record, out_channels=2).eval()
    alone = build_encoder(record).eval()
    alone.load_state_dict(network.swinViT.state_dict())
    x = torch.rand(1, 1, 64, 32, 32)
    with torch.no_grad():
        for one, other in zip(alone(x), network.swinViT(x), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_encoder_does_not_train_and_the_decoder_does(record, freeze):
    network = build_swin_unetr(record, out_channels=2, freeze_encoder=freeze)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad is (not freeze or not name.startswith("swinViT."))


@pytest.mark.parametrize("drop_path", [-0.1, 1.0, 1.5, True])
def test_a_drop_path_that_is_no_probability_is_refused(record, drop_path):
    with pytest.raises(InputError, match=f"--drop_path {drop_path} must be a number, 0 or above and below 1"):
        build_swin_unetr(record, out_channels=2, drop_path=drop_path)


@pytest.mark.parametrize(("merging", "kind"), [("legacy", LegacyPatchMerging), ("monai", PatchMerging)])
def test_the_record_chooses_the_patch_merging(record, merging, kind):
    record = record | {"merging": merging}
    for encoder in (build_encoder(record), build_swin_unetr(record, out_channels=2).swinViT):
        kinds = [type(encoder.get_submodule(f"layers{stage}.0.downsample")) for stage in (1, 2, 3, 4)]
        assert kinds == [kind] * 4
