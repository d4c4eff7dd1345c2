# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The reimplemented released procedure has the bundle's loss on the same views; the benchmark reports its numbers."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.pretrain_step import (
    ANOMALY,
    DEFAULT_SIDES,
    OFFICIAL,
    OURS,
    Job,
    OfficialProcedure,
    bundle_config,
    bundle_side,
    main,
    make_crops,
    make_network,
)

JOB = Job(feature_size=12, roi=(32, 64, 64), batch=2, steps=1, device="cpu", precision="fp32")


def test_the_same_views_have_the_same_loss_and_gradients():
    config = bundle_config(JOB)
    views, loss_function = config.get_parsed_content("views"), config.get_parsed_content("loss")
    masked, targets = views({"image": make_crops(JOB), "draw": torch.tensor([3, 3])}, "cpu")
    assert len(set(targets["turns"].tolist())) > 1 and targets["mask"].any()

    ours = make_network(JOB, fast=True)
    loss = loss_function(ours(masked), targets)
    loss.backward()

    stock = make_network(JOB, fast=False)
    procedure = OfficialProcedure(stock, device="cpu")
    expected, inpainting = procedure.loss(masked.chunk(2), targets["crop"].chunk(2), targets["turns"].chunk(2))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss_function.parts["inpainting"].item() == pytest.approx(inpainting.item(), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert (parameter.grad - gradients[name]).norm() <= 1e-3 * gradients[name].norm() + 1e-5, name


def test_the_bundles_engine_makes_the_step_that_its_parts_make_by_hand():
    config = bundle_config(JOB)
    network = make_network(JOB, fast=True)
    masked, targets = config.get_parsed_content("views")(
        {"image": make_crops(JOB), "draw": torch.tensor([0, 0])}, "cpu"
    )
    expected = config.get_parsed_content("loss")(network(masked), targets).item()
    assert bundle_side(JOB, fast=True)() == pytest.approx(expected, abs=1e-5)


def test_the_released_procedure_turns_and_masks_each_crop_for_itself():
    procedure = OfficialProcedure(torch.nn.Linear(1, 1), device="cpu")
    crops = make_crops(Job(feature_size=12, roi=(64, 64, 64), batch=3, steps=1, device="cpu", precision="fp32"))
    turned, turns = procedure.rotated(crops)
    for crop, result, quarters in zip(crops, turned, turns.tolist(), strict=True):
        assert torch.equal(result, crop.rot90(quarters, (2, 3)) if quarters else crop)
    shares = []
    for _ in range(10):
        masked = procedure.masked(crops)
        assert 0 <= masked.min() and masked.max() <= 1
        shares.extend((masked != crops).float().mean(dim=(1, 2, 3, 4)).tolist())
    assert min(shares) < 0.2 and 0.1 < sum(shares) / len(shares) < 0.4 and max(shares) < 0.65
    assert (masked == crops).any() and (masked != crops).any()


def test_a_step_of_the_released_procedure_moves_the_weights():
    network = make_network(JOB, fast=False)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    value = OfficialProcedure(network, device="cpu").step(make_crops(JOB))
    assert 0 < value < 20
    moved = [name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)


def test_the_command_prints_the_ratio_and_writes_the_numbers(here, tmp_path, capsys):
    options = ["--feature_size", "12", "--roi", "32", "64", "64", "--batch", "1", "--runs", "1", "--steps", "1"]
    assert main([*options, "--device", "cpu", "--precision", "fp32", "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "pre-training, feature size 12, 1 crop of 32 x 64 x 64, 1 step per run; ratios to official" in shown
    assert all(side in shown for side in DEFAULT_SIDES)
    results = json.loads((tmp_path / "out.json").read_text())
    sides = results["sides"]
    assert set(sides) == set(DEFAULT_SIDES) and results["reference"] == OFFICIAL
    assert sides[OFFICIAL]["ratio"] == 1 and sides[OURS]["ratio"] > 0 and sides[OURS]["memory_ratio"] == 1
    assert sides[ANOMALY]["flops"] == sides[OFFICIAL]["flops"] > 1e8 and sides[OURS]["flops"] > 1e8
    assert all(0 < side["result"] < 20 and side["limit"] > 0 for side in sides.values())
    assert {"machine", "floor", "options"} <= set(results)
