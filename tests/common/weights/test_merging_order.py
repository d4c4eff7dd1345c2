# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The order of patch merging is what the file says, else the table of known files, else the user: never a guess."""

from __future__ import annotations

import hashlib

import pytest
import torch
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.common.networks.patch_merging import MERGING
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights import merging_order as weights_merging
from bundles.common.weights.dialects import find_weights
from bundles.common.weights.encoder_record import read_record, resolve_encoder
from bundles.common.weights.loading import encoder_state
from bundles.common.weights.merging_order import CATALOGUE, merging_of


@pytest.fixture
def save(tmp_path, record):
    state = encoder_state(build_swin_unetr(record, out_channels=2))

    def to(name, **beside):
        torch.save({"state_dict": state, **beside}, tmp_path / name)
        return find_weights(tmp_path / name)

    return to


def test_the_files_own_record_comes_first(save, record):
    found = save("model_swinvit.pt", encoder=record)  # the table calls files of this name legacy
    assert merging_of(found, None) == ("monai", "its own encoder record")
    assert merging_of(found, "monai")[0] == "monai"
    with pytest.raises(
        InputError, match="model_swinvit.pt needs --merging monai, not legacy, according to its own encoder record"
    ):
        merging_of(found, "legacy")


@pytest.mark.parametrize("name", ["VoComni_B.pt", "supervised_suprem_swinunetr_2100.pth"])
def test_published_files_are_known_by_name_which_the_user_may_contradict(save, name, caplog, monkeypatch):
    monkeypatch.setattr(weights_merging, "_compare", lambda found, known: None)  # the file here is tiny
    merging, says = merging_of(save(name), None)
    assert merging == "legacy" and "table of known files" in says and says.endswith("by name")
    assert merging_of(save(name), "monai") == ("monai", "--merging")
    assert f"{name}: files of this name need merging legacy" in caplog.text


def test_a_known_file_without_its_last_block_is_refused(save):
    with pytest.raises(
        InputError, match="model_swinvit.pt differs from the known file of this name.*feature_size is 12, not 48"
    ):
        merging_of(save("model_swinvit.pt"), None)
    assert merging_of(save("model_swinvit.pt"), "legacy")[0] == "legacy"  # another file of that name


def test_and_by_checksum_under_any_name_which_the_user_may_not_contradict(save, monkeypatch):
    found = save("renamed.pt")
    with open(found.path, "rb") as file:
        md5 = {"x.pt": hashlib.md5(file.read()).hexdigest()}
    rows = [{"names": ["x.pt"], "md5": md5, "merging": "legacy", "what": "x"}]
    monkeypatch.setattr(ConfigParser, "load_config_file", lambda file: rows)
    assert merging_of(found, None) == ("legacy", "the table of known files (x), by MD5")
    with pytest.raises(
        InputError, match="renamed.pt needs --merging legacy, not monai, according to the table of known files"
    ):
        merging_of(found, "monai")


def test_the_table_names_files_once_and_says_what_they_are():
    rows = ConfigParser.load_config_file(CATALOGUE)
    names = [name for row in rows for name in row["names"]]
    assert len(names) == len(set(names)) >= 12
    assert all(row["merging"] in MERGING and row["what"] for row in rows)
    assert all(set(row.get("md5") or {}) <= set(row["names"]) for row in rows)
    zoo = "model_swin_unetr_btcv_segmentation_v1.pt"
    assert next(row for row in rows if zoo in row["names"])["md5"] == {zoo: "50dd67a01b28a1d5487fd9ac27e682fb"}


def test_else_the_user_is_asked_with_the_reason(save):
    found = save("weights.pt")
    with pytest.raises(
        InputError,
        match="weights.pt does not record.*MONAI 1.5 changed.*other features.*--merging legacy.*--merging monai",
    ):
        merging_of(found, None)
    assert merging_of(found, "legacy") == ("legacy", "--merging")
    with pytest.raises(InputError, match="--merging 'old' is not one of monai, legacy"):
        merging_of(found, "old")


def test_the_network_is_built_as_the_weights_want(save, record):
    preset = {**record, "feature_size": 48}
    found = save("weights.pt")
    resolved = resolve_encoder(asked={"merging": "legacy"}, preset=preset, checkpoint=found.path)
    assert resolved == record | {"merging": "legacy"}
    network = build_swin_unetr(resolved, out_channels=2)
    assert isinstance(network.swinViT.layers1[0].downsample, MERGING["legacy"])


def test_a_record_that_contradicts_its_tensors_is_refused(save, record):
    found = save("weights.pt", encoder=record | {"window_size": 7})
    with pytest.raises(
        InputError, match="weights.pt contradicts itself: window_size is 7 in its record, but 4 by its tensors"
    ):
        read_record(found.path)


def test_checksums_are_taken_once(save, monkeypatch):
    found = save("weights.pt")
    weights_merging._md5.cache_clear()
    for _ in range(3):
        with pytest.raises(InputError):
            merging_of(found, None)
    assert weights_merging._md5.cache_info().misses == 1
