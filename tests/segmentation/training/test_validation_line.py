# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The Dice of each organ is the mean over the cases that have it."""

from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Engine, Events
from monai.handlers import MeanDice

from bundles.segmentation.training.validation_line import OrganDice, ValidationLine

LABELS = {"0": "background", "1": "liver", "2": "left kidney", "3": "spleen"}


def one_hot(*values: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(values), 4).T.float()[:, :, None, None]


def test_organs_are_measured_over_the_cases_that_have_them(caplog):
    """liver: 1 and 2/3; left kidney: only in the second case, not found; spleen: in none."""
    cases = [
        (one_hot(1, 1, 0, 0), one_hot(1, 1, 0, 0)),
        (one_hot(1, 0, 0, 0), one_hot(1, 1, 2, 0)),
    ]
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.state.metric_details = {}
    MeanDice(include_background=False, output_transform=lambda out: ([out[0]], [out[1]])).attach(evaluator, "mean_dice")
    OrganDice(metric="mean_dice", labels=LABELS).attach(evaluator)
    ValidationLine(metric="mean_dice").attach(evaluator)
    seen = {}
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.update(engine.state.metrics))
    with caplog.at_level("INFO", logger="bundles"):
        evaluator.run(cases)
    assert seen == {
        "mean_dice": pytest.approx((1 + (2 / 3 + 0) / 2) / 2),
        "dice_liver": pytest.approx(5 / 6),
        "dice_left_kidney": 0.0,
    }
    assert not any(math.isnan(value) for value in seen.values())
    assert [record.getMessage() for record in caplog.records if record.name.startswith("bundles")] == [
        f"validation  mean_dice {seen['mean_dice']:.4f}; 1 of 2 organs not found: left_kidney"
    ]


def test_a_validation_that_found_all_organs_says_nothing_of_them(caplog):
    evaluator = Engine(lambda engine, batch: engine.state.metrics.update(mean_dice=0.5, dice_liver=0.5))
    ValidationLine(metric="mean_dice").attach(evaluator)
    with caplog.at_level("INFO", logger="bundles"):
        evaluator.run([0])
    assert caplog.messages[-1] == "validation  mean_dice 0.5000"
