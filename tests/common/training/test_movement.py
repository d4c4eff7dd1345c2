# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How far the parts of a network have moved, against values computed by hand, and the same after a resume."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.training.movement import Movement, moved, weight_matrices
from bundles.common.training.weight_average import WeightAverage
from bundles.common.weights.checkpoint_file import load_checkpoint_file
from bundles.pretraining.network import SwinPretrainer

from .test_checkpoint import EPOCH_LENGTH, train


class Parts(nn.Module):
    """Two matrices in one stage, a kernel outside, and what is left out."""

    def __init__(self):
        super().__init__()
        self.swinViT = nn.ModuleDict({"layers1": nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 2), nn.LayerNorm(2)])})
        self.decoder1 = nn.Conv3d(1, 1, kernel_size=(1, 1, 2))
        self.out = nn.Linear(1, 1)
        self.table = nn.Parameter(torch.ones(2, 2))
        with torch.no_grad():
            self.swinViT["layers1"][0].weight.copy_(torch.tensor([[3.0, 0.0]]))
            self.swinViT["layers1"][1].weight.copy_(torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
            self.decoder1.weight.copy_(torch.tensor([1.0, 1.0]).view(1, 1, 1, 1, 2))
            self.out.weight.zero_()


def started(network):
    return {name: weight.detach().clone() for name, weight in weight_matrices(network)}


def test_cosine_and_distance_by_hand():
    network = Parts()
    start = started(network)
    with torch.no_grad():
        network.swinViT["layers1"][0].weight.copy_(torch.tensor([[0.0, 3.0]]))  # a right angle
        network.swinViT["layers1"][1].weight.mul_(2)  # the same direction
        network.decoder1.weight.copy_(torch.tensor([1.0, -3.0]).view(1, 1, 1, 1, 2))
        for left_out in (network.table, network.swinViT["layers1"][2].weight, network.decoder1.bias):
            left_out.sub_(7)
        network.out.weight.fill_(5)  # it began as zeros
    found = moved(start, network)
    # start (3, 0, 0, 4): 25; now (0, 3, 0, 8): 73; product 32; difference (-3, 3, 0, 4): 34
    assert found["cosine"] == {
        "swinViT.layers1": round(32 / math.sqrt(25 * 73), 6),
        "decoder1": round(-2 / math.sqrt(2 * 10), 6),
    }
    assert found["distance"] == {"swinViT.layers1": round(math.sqrt(34 / 25), 6), "decoder1": round(math.sqrt(8), 6)}
    assert found["median_cosine"] == {"swinViT": 0.5, "rest": round(-2 / math.sqrt(20), 6)}  # of 0 and 1


def test_nothing_has_moved_at_the_start():
    network = Parts()
    found = moved(started(network), network)
    assert set(found["cosine"].values()) == set(found["median_cosine"].values()) == {1.0}
    assert set(found["distance"].values()) == {0.0}


def test_weights_that_became_zero_have_no_angle_and_have_moved_by_all_they_were():
    network = Parts()
    start = started(network)
    with torch.no_grad():
        network.decoder1.weight.zero_()
    assert (moved(start, network)["cosine"]["decoder1"], moved(start, network)["distance"]["decoder1"]) == (0.0, 1.0)


def test_a_tiny_movement_is_measured():
    network = nn.Sequential(nn.Linear(1000, 1000))
    start = started(network)
    with torch.no_grad():
        network[0].weight.mul_(1.0001)
    (distance,) = moved(start, network)["distance"].values()
    assert distance == pytest.approx(1e-4, abs=2e-6)
    assert list(moved(start, network)["cosine"].values()) == [1.0]


@pytest.mark.parametrize("kind", ["segmentation", "pre-training"])
def test_what_is_measured_is_nearly_the_whole_network(record, kind):
    if kind == "segmentation":
        network = build_swin_unetr(record, out_channels=3)
        parts = {"decoder5", "decoder1", "out", "encoder1", "encoder10", "swinViT.patch_embed"}
    else:
        network = SwinPretrainer(encoder=record, tasks=["inpainting", "contrast", "rotation"])
        parts = {"conv", "rotation_head", "contrastive_head", "swinViT.patch_embed"}
    start = started(network)
    share = sum(weight.numel() for weight in start.values()) / sum(p.numel() for p in network.parameters())
    assert share > 0.98
    found = moved(start, network)
    assert parts | {f"swinViT.layers{n}" for n in (1, 2, 3, 4)} <= set(found["cosine"])
    assert not any("norm" in name or "table" in name for name in start)


def test_a_frozen_encoder_is_left_out(record):
    network = build_swin_unetr(record, out_channels=3, freeze_encoder=True)
    found = moved(started(network), network)
    assert set(found["median_cosine"]) == {"rest"} and not any("swinViT" in part for part in found["cosine"])


class Moving:
    """`Movement` for the network that `train` builds, and what it recorded after each epoch."""

    def __init__(self):
        self.seen = []

    def __call__(self, network):
        return [Movement(network=network), self]

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: self.seen.append((e.state.epoch, e.state.moved)))


def recorded(folder, name="model.pt"):
    return load_checkpoint_file(folder / name)["trained"]["moved"]


@pytest.mark.parametrize("killed_in_step", [2, 7, 14])
def test_a_resumed_run_is_compared_with_the_true_start(tmp_path, record, killed_in_step):
    unbroken, killed, resumed = Moving(), Moving(), Moving()
    train(tmp_path / "unbroken", record, more=unbroken)
    train(tmp_path / "killed", record, more=killed, killed_in_step=killed_in_step)
    train(tmp_path / "killed", record, more=resumed, resume=True)
    assert killed.seen + resumed.seen == unbroken.seen and len(unbroken.seen) == 5
    distances = [found["distance"]["decoder"] for _, found in unbroken.seen]
    assert len(set(distances)) == 5 and min(distances) > 0.01
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "unbroken")
    for name in ("last.pt", "model.pt"):
        one, other = (load_checkpoint_file(tmp_path / run / name) for run in ("killed", "unbroken"))
        assert one.get("counts") == other.get("counts")


@pytest.mark.parametrize("stopped_in_validation", [2, 5])
def test_a_validation_that_is_repeated_on_resume_is_recorded_as_ever(tmp_path, record, stopped_in_validation):
    unbroken, resumed = Moving(), Moving()
    train(tmp_path / "unbroken", record, more=unbroken)
    train(tmp_path / "stopped", record, stopped_in_validation=stopped_in_validation, more=Moving())
    train(tmp_path / "stopped", record, more=resumed, resume=True)
    assert resumed.seen == unbroken.seen[stopped_in_validation - 1 :]
    assert recorded(tmp_path / "stopped") == recorded(tmp_path / "unbroken")


def test_the_record_belongs_to_the_weights_of_its_file(tmp_path, record):
    moving = Moving()
    train(tmp_path, record, more=moving, scores=(0.1, 0.9, 0.3, 0.4, 0.2))
    assert load_checkpoint_file(tmp_path / "model.pt")["trained"]["steps"] == 2 * EPOCH_LENGTH
    assert recorded(tmp_path) == dict(moving.seen)[2] != dict(moving.seen)[5]


def test_another_start_is_noticed_and_nothing_wrong_is_recorded(tmp_path, record, monkeypatch, caplog):
    scores = (0.1, 0.2, 0.3, 0.4, 0.5)
    train(tmp_path, record, more=Moving(), scores=scores, killed_in_step=8)
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seed(1))
    moving = Moving()
    train(tmp_path, record, more=moving, scores=scores, resume=True)
    assert [found for _, found in moving.seen] == [{}, {}, {}]
    assert recorded(tmp_path) == {}
    assert caplog.text.count("other start weights") == 1


def epochs(network, *, steps, before=None):
    """Run an engine that adds ``before`` to all weights in each epoch."""
    engine = Engine(lambda e, batch: before())
    movement = Movement(network=network)
    movement.attach(engine)
    engine.run([0], max_epochs=steps)
    return engine


def test_the_average_is_what_is_measured_if_it_is_what_is_saved():
    network = nn.Sequential(nn.Linear(4, 4))
    average = WeightAverage(network=network, steps=2)
    w0 = network[0].weight.detach().clone()
    step = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def move():
        with torch.no_grad():
            network[0].weight.add_(step)
        average.update()

    engine = epochs(average.network, steps=2, before=move)
    expected = float((1.5 * step).norm() / w0.norm())  # the mean of one step and two
    assert engine.state.moved["distance"]["0"] == pytest.approx(expected, rel=1e-5)


def test_the_log_has_one_line_with_both_medians(caplog):
    caplog.set_level(logging.INFO)
    epochs(Parts(), steps=1, before=lambda: None)
    (line,) = [message for message in caplog.messages if "cosine" in message]
    assert line.endswith("swinViT 1.0000, rest 1.0000")


def test_only_rank_0_measures(monkeypatch):
    monkeypatch.setattr("bundles.common.training.movement.rank", lambda: 1)
    engine = epochs(Parts(), steps=1, before=lambda: None)
    assert not hasattr(engine.state, "moved") and engine.state_dict_user_keys == []


def test_the_copy_of_the_start_does_not_move_with_the_network():
    network = Parts()
    assert np.isclose(
        epochs(network, steps=1, before=lambda: network.decoder1.weight.data.mul_(3)).state.moved["distance"][
            "decoder1"
        ],
        2.0,
    )
