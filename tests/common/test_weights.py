# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A file fits the network tensor by tensor, or nothing of it is loaded."""

from __future__ import annotations

import logging

import pytest
import torch

from bundles.common.checkpoint_file import save_atomically
from bundles.common.input_error import InputError
from bundles.common.swin_encoder import build_swin_unetr
from bundles.common.weights import encoder_state, load_encoder, load_model


class TinyNetwork(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.swinViT = torch.nn.Linear(3, 2)
        self.decoder = torch.nn.Linear(2, 1)


def copy_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "weights.pt")


def test_all_tensors_of_a_model_are_loaded_and_the_rest_of_the_file_is_returned(path):
    source, target = TinyNetwork(), TinyNetwork()
    save_atomically({"model": source.state_dict(), "encoder": {"depths": [1]}, "trained": {"steps": 7}}, path)
    assert load_model(target, path) == {"encoder": {"depths": [1]}, "trained": {"steps": 7}}
    assert equal(target.state_dict(), source.state_dict())


def without(state):
    del state["decoder.bias"], state["swinViT.weight"]


def with_more(state):
    state["head.weight"] = torch.zeros(1)


def with_another_shape(state):
    state["decoder.weight"] = torch.zeros(4, 2)


def with_another_prefix(state):
    for name in list(state):
        state[f"module.{name}"] = state.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without, ["2 tensors missing (first: decoder.bias)"]),
        (with_more, ["1 that the network does not have (first: head.weight)"]),
        (with_another_shape, ["1 of another shape (first: decoder.weight (4, 2) in the file, (1, 2) in the network)"]),
        (with_another_prefix, ["4 tensors missing", "4 that the network does not have (first: module.decoder.bias)"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused_whole_with_the_difference(path, change, words):
    state = copy_of(TinyNetwork())
    change(state)
    save_atomically({"model": state}, path)
    network = TinyNetwork()
    before = copy_of(network)
    with pytest.raises(InputError) as caught:
        load_model(network, path)
    assert all(word in str(caught.value) for word in [path, "Nothing was loaded", *words])
    assert equal(network.state_dict(), before)


def test_files_of_another_kind_are_refused_by_name(path):
    save_atomically({"w": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="weights.pt is not a model.pt .* no 'model'"):
        load_model(TinyNetwork(), path)
    with pytest.raises(InputError, match="weights.pt is not an encoder.pt .* no 'state_dict'"):
        load_encoder(TinyNetwork(), path)


def test_an_encoder_is_loaded_and_the_decoder_keeps_its_values(path, record):
    source, target = (build_swin_unetr(record, out_channels=out) for out in (2, 5))
    before = copy_of(target)
    save_atomically({"state_dict": encoder_state(source), "encoder": record, "trained": {}}, path)
    load_encoder(target, path)
    after, wanted = target.state_dict(), source.state_dict()
    encoder_names = [name for name in after if name.startswith("swinViT.")]
    assert len(encoder_names) > 50
    assert all(torch.equal(after[name], wanted[name]) for name in encoder_names)
    assert all(torch.equal(after[name], before[name]) for name in after if name not in encoder_names)
    assert any(not torch.equal(before[name], wanted[name]) for name in encoder_names)


@pytest.mark.parametrize("change", ["decoder in the file", "tensor missing"])
def test_an_encoder_file_holds_the_encoder_and_nothing_else(path, change):
    state = copy_of(TinyNetwork())
    if change == "tensor missing":
        state = {"swinViT.weight": state["swinViT.weight"]}
    save_atomically({"state_dict": state}, path)
    with pytest.raises(InputError, match="swinViT.bias" if change == "tensor missing" else "decoder.bias"):
        load_encoder(TinyNetwork(), path)


def test_the_encoder_state_is_the_encoder_detached():
    network = TinyNetwork()
    state = encoder_state(network)
    assert list(state) == ["swinViT.weight", "swinViT.bias"]
    assert torch.equal(state["swinViT.weight"], network.swinViT.weight) and not state["swinViT.weight"].requires_grad


def test_settings_that_differ_from_the_training_are_warned_of(path, caplog):
    trained = {"spacing": [1.5, 1.5, 2.0], "roi_size": [96, 96, 96], "hu_window": [-175.0, 250.0]}
    save_atomically({"model": TinyNetwork().state_dict(), "trained": trained}, path)
    expected = {"spacing": [1.0, 1.0, 1.0], "roi_size": (96, 96, 96), "hu_window": [-175.0, 250.0], "unknown": 1}
    with caplog.at_level(logging.WARNING):
        load_model(TinyNetwork(), path, expected=expected)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"{path} was trained with spacing [1.5, 1.5, 2.0]; this run uses [1.0, 1.0, 1.0]"]
