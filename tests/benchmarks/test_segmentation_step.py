# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Both sides have the same loss on the same crops; the benchmark reports its numbers."""

from __future__ import annotations

import json

import pytest

from benchmarks.segmentation_step import (
    CLASSES,
    DEFAULT_SIDES,
    OURS,
    OURS_STOCK,
    STOCK,
    Job,
    bundle_config,
    bundle_side,
    main,
    make_crops,
    make_network,
    stock_loss,
    stock_side,
)

JOB = Job(feature_size=12, roi=(64, 64, 32), batch=1, steps=1, device="cpu", precision="fp32")


def test_the_same_crops_have_the_same_loss_and_gradients():
    image, label = make_crops(JOB)
    assert set(label.unique().tolist()) <= set(range(CLASSES)) and len(label.unique()) > 5
    ours, stock = (make_network(JOB, fast=fast) for fast in (True, False))
    loss = bundle_config(JOB).get_parsed_content("loss")(ours(image), label)
    expected = stock_loss()(stock(image), label)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-3 * gradients[name].norm() + 1e-5, name


def test_the_first_losses_of_both_sides_agree():
    losses = [side() for side in (bundle_side(JOB, fast=True), bundle_side(JOB, fast=False), stock_side(JOB))]
    assert losses == pytest.approx([losses[-1]] * 3, abs=1e-4)


def test_the_command_prints_the_ratio_and_writes_the_numbers(here, tmp_path, capsys):
    options = ["--feature_size", "12", "--roi", "64", "64", "32", "--batch", "1", "--runs", "1", "--steps", "1"]
    assert main([*options, "--device", "cpu", "--precision", "fp32", "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "segmentation, feature size 12, 14 classes, 1 crop of 64 x 64 x 32, 1 step per run; ratios to stock" in shown
    results = json.loads((tmp_path / "out.json").read_text())
    sides = results["sides"]
    assert set(sides) == set(DEFAULT_SIDES) == {OURS, STOCK} and OURS_STOCK not in shown
    assert sides[STOCK]["ratio"] == 1 and sides[OURS]["ratio"] > 0
    assert all(side["flops"] > 1e8 and side["bytes"] > 1e8 and side["limit"] > 0 for side in sides.values())
    assert {"machine", "floor", "options"} <= set(results)
