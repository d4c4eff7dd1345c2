# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps are cut into equal epochs, and never fewer than were asked for."""

from __future__ import annotations

import pytest

from bundles.common.epoch_plan import epoch_plan
from bundles.common.input_error import InputError


@pytest.mark.parametrize(
    ("max_steps", "val_interval", "epochs", "epoch_length"),
    [(200, 100, 2, 100), (250, 100, 3, 84), (5, 100, 1, 5), (1, 1, 1, 1), (101, 100, 2, 51), (7, 3, 3, 3)],
)
def test_hand_made_plans(max_steps, val_interval, epochs, epoch_length):
    plan = epoch_plan(max_steps=max_steps, val_interval=val_interval)
    assert plan == {"epochs": epochs, "epoch_length": epoch_length, "steps": epochs * epoch_length}


def test_a_plan_covers_the_steps_with_less_than_one_step_per_epoch_to_spare():
    for max_steps in range(1, 60):
        for val_interval in range(1, 70):
            plan = epoch_plan(max_steps=max_steps, val_interval=val_interval)
            assert max_steps <= plan["steps"] < max_steps + plan["epochs"]
            assert plan["epoch_length"] <= val_interval


@pytest.mark.parametrize("name", ["max_steps", "val_interval"])
@pytest.mark.parametrize("value", [0, 10.0])
def test_other_than_whole_numbers_from_one_are_refused_by_name_and_value(name, value):
    with pytest.raises(InputError, match=f"--{name} {value} must be a whole number of at least 1"):
        epoch_plan(**{"max_steps": 10, "val_interval": 10, name: value})


def test_a_warm_up_as_long_as_the_run_is_warned_of(caplog):
    epoch_plan(max_steps=300, val_interval=100, warmup_steps=299)
    assert not caplog.records
    epoch_plan(max_steps=300, val_interval=100, warmup_steps=500)
    assert "warm-up of 500 steps" in caplog.text
