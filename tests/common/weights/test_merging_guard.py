# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights go into a network of their own patch-merging order or into none, through whatever door they come."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.handlers import Checkpoint
from monai.networks import copy_model_state
from torch.optim.swa_utils import AveragedModel

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.loading import load_model
from bundles.common.weights.merging_guard import MergingGuard, trusted_weights


@pytest.fixture
def build(record):
    def network(seed=0, merging="monai", **guard):
        torch.manual_seed(seed)
        guard = MergingGuard(merging=merging, **guard) if guard else None
        return build_swin_unetr(record | {"merging": merging}, out_channels=3, guard=guard)

    return network


@pytest.fixture
def saved(tmp_path, record, build):
    """Write the weights of a network, with its encoder record."""

    def save(name, *, seed=1, merging="monai", described=True):
        network = build(seed=seed, merging=merging)
        content = {"model": network.state_dict()} | ({"encoder": record | {"merging": merging}} if described else {})
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


DOORS = {
    "load_state_dict": lambda network, state: network.load_state_dict(state),
    "ignite, as in ckpt_export": lambda network, state: Checkpoint.load_objects({"model": network}, {"model": state}),
    "MONAI's copy_model_state": lambda network, state: copy_model_state(dst=network, src=state),
    "a copy of the network": lambda network, state: copy.deepcopy(network).load_state_dict(state),
    "wrapped": lambda network, state: AveragedModel(network).load_state_dict(
        {"n_averaged": torch.tensor(0)} | {f"module.{name}": tensor for name, tensor in state.items()}
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("merging", ["monai", "legacy"])
def test_the_weights_of_its_file_are_accepted_and_others_refused(saved, build, door, merging):
    file = saved("model.pt", merging=merging)
    network = build(merging=merging, files=[file])
    DOORS[door](network, torch.load(file, weights_only=True)["model"])
    other = build(seed=5).state_dict()
    with pytest.raises(InputError, match=r"built for .*model\.pt, with patch merging .* but is given other weights"):
        DOORS[door](network, other)


def test_a_network_of_the_other_order_refuses_a_file_that_says_its_own(saved, build):
    """As when a preset builds the network, and ckpt_export brings legacy weights."""
    file = saved("model.pt", merging="legacy")
    network = build(merging="monai", files=[None, file])
    with pytest.raises(InputError, match="need patch merging legacy, but the network was built with monai"):
        network.load_state_dict(torch.load(file, weights_only=True)["model"])


def test_a_network_that_was_built_without_a_file_refuses_what_it_cannot_know(saved, build, tmp_path):
    state = torch.load(saved("x.pt"), weights_only=True)["model"]
    network = build(files=[str(tmp_path / "models" / "model.pt")])
    with pytest.raises(InputError, match=r"--pretrained_model FILE, which tells the order, or set --merging"):
        network.load_state_dict(state)
    network = build(files=[str(tmp_path / "models" / "model.pt")], asked="monai")  # the user answers for it
    network.load_state_dict(state)
    with trusted_weights():
        build(files=[]).load_state_dict(state)


def test_the_file_may_be_replaced_after_the_network_was_built(saved, build):
    """As MONAI Label does after a training."""
    file = saved("model.pt", seed=1)
    network = build(files=[file])
    saved("model.pt", seed=2)
    network.load_state_dict(torch.load(file, weights_only=True)["model"])
    saved("model.pt", seed=3, merging="legacy")
    with pytest.raises(InputError, match="need patch merging legacy"):
        network.load_state_dict(torch.load(file, weights_only=True)["model"])


def test_another_file_of_the_bundle_may_be_loaded_if_its_order_fits(saved, build, tmp_path):
    """As MONAI Label does with the option model_filename."""
    file, shipped = saved("model.pt", seed=1), saved("shipped_model.pt", seed=2)
    network = build(files=[file], folder=str(tmp_path))
    network.load_state_dict(torch.load(shipped, weights_only=True)["model"])
    legacy = saved("legacy.pt", seed=3, merging="legacy")
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="need patch merging legacy"):
        network.load_state_dict(torch.load(legacy, weights_only=True)["model"])


def test_our_own_loading_checks_by_itself(saved, build):
    network = build(files=[])
    load_model(network, saved("model.pt"))  # its record was compared
    network.load_state_dict({}, strict=False)  # nothing that an order matters for
