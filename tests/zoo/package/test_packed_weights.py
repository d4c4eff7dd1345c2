# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Packed weights have the numbers of the training, and of its record the names, not the folders of a machine."""

from __future__ import annotations

import pytest
import torch

from bundles.common.errors import InputError
from zoo.package.packed_weights import copy_weights, open_safely, read_weights

WEIGHT = torch.tensor([1.0, 1 / 3, -2e-5])


def packed(tmp_path, content, **options):
    (tmp_path / "models").mkdir()
    torch.save(content, tmp_path / "models" / "model.pt")
    copy_weights("swin_unetr_msd", tmp_path / "models", tmp_path / "packed", **options)
    return torch.load(tmp_path / "packed" / "model.pt", weights_only=True)


def test_the_record_names_data_and_start_weights_without_their_folders(tmp_path):
    start = {"file": "/home/someone/runs/encoder.pt", "loaded": 7}
    trained = {"data": "/home/someone/data/liver", "start": start, "steps": 5}
    content = packed(tmp_path, {"model": {"w": WEIGHT}, "trained": trained, "labels": {"0": "background"}})
    assert content["trained"] == {"data": "liver", "start": {"file": "encoder.pt", "loaded": 7}, "steps": 5}
    assert torch.equal(content["model"]["w"], WEIGHT) and content["labels"] == {"0": "background"}


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"w": WEIGHT}},
        {"model": {"w": WEIGHT}, "trained": {"data": "liver", "start": {"file": "encoder.pt"}}},
        {"model": {"w": WEIGHT}, "trained": {"data": None, "start": None}},
    ],
)
def test_a_file_that_names_no_folder_is_copied_to_the_byte(tmp_path, content):
    packed(tmp_path, content)
    assert (tmp_path / "packed" / "model.pt").read_bytes() == (tmp_path / "models" / "model.pt").read_bytes()


def test_several_folders_of_data_are_named_without_their_place(tmp_path):
    trained = {"data": ["/home/someone/a", "/data/b", "c"]}
    assert packed(tmp_path, {"model": {"w": WEIGHT}, "trained": trained})["trained"]["data"] == ["a", "b", "c"]


def test_half_precision_rounds_numbers_and_leaves_whole_ones(tmp_path):
    content = packed(tmp_path, {"model": {"w": WEIGHT, "n": torch.tensor([3])}, "trained": {"steps": 5}}, half=True)
    assert content["model"]["w"].dtype == torch.float16 and torch.equal(content["model"]["w"], WEIGHT.half())
    assert content["model"]["n"].dtype == torch.int64 and content["trained"] == {"steps": 5}


def test_a_weight_that_half_precision_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"weights up to 7e\+04, too large for half precision"):
        packed(tmp_path, {"model": {"w": torch.tensor([7e4])}}, half=True)


def test_what_is_opened_safely_is_what_was_saved(tmp_path):
    torch.save({"model": {"w": WEIGHT}, "task": "Own", "row": [1]}, tmp_path / "model.pt")
    assert torch.equal(open_safely(tmp_path / "model.pt")["model"]["w"], WEIGHT)
    weights = read_weights(tmp_path)
    assert (weights.task, weights.row, weights.labels, weights.encoder, weights.trained) == ("Own", None, None, {}, {})
