# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps are cut into equal epochs, and never fewer than were asked for."""

from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from bundles.common.training.epoch_plan import accumulation, epoch_plan


@pytest.mark.parametrize(
    ("max_steps", "val_interval", "epochs", "epoch_length"),
    [(200, 100, 2, 100), (250, 100, 3, 84), (5, 100, 1, 5), (1, 1, 1, 1), (101, 100, 2, 51), (7, 3, 3, 3)],
)
def test_hand_made_plans(max_steps, val_interval, epochs, epoch_length):
    plan = epoch_plan(max_steps=max_steps, val_interval=val_interval)
    steps = epochs * epoch_length
    assert plan == {
        "epochs": epochs,
        "epoch_length": epoch_length,
        "steps": steps,
        "iterations": steps,
        "warmup_steps": 0,
        "new_parts_steps": 0,
    }


def test_an_accumulated_step_takes_several_iterations():
    plan = epoch_plan(max_steps=7, val_interval=3, accumulation_steps=4)
    assert plan == {
        "epochs": 3,
        "epoch_length": 12,
        "steps": 9,
        "iterations": 36,
        "warmup_steps": 0,
        "new_parts_steps": 0,
    }


def test_another_number_of_epochs_leaves_their_length():
    plan = epoch_plan(max_steps=250, val_interval=100, warmup_steps=5, epochs=2)
    assert plan == {
        "epochs": 2,
        "epoch_length": 84,
        "steps": 168,
        "iterations": 168,
        "warmup_steps": 5,
        "new_parts_steps": 0,
    }
    with pytest.raises(InputError, match="--max_epochs 0 must be a whole number"):
        epoch_plan(max_steps=250, val_interval=100, epochs=0)


@pytest.mark.parametrize(
    ("scans", "batch_size", "accumulation_steps", "processes", "steps_of_a_pass"),
    [(5, 1, 1, 1, 5), (5, 2, 1, 1, 3), (5, 1, 2, 1, 3), (5, 1, 1, 2, 3), (1, 4, 2, 2, 1)],
)
def test_an_epoch_of_monai_label_is_a_pass_over_the_scans(
    monkeypatch, scans, batch_size, accumulation_steps, processes, steps_of_a_pass
):
    monkeypatch.setattr("bundles.common.training.epoch_plan.world_size", lambda: processes)
    asked = {"max_steps": 120000, "val_interval": 2400, "warmup_steps": 1200, "new_parts_steps": 6000, "epochs": 50}
    plan = epoch_plan(**asked, scans=scans, batch_size=batch_size, accumulation_steps=accumulation_steps)
    assert plan["steps"] == 50 * steps_of_a_pass and plan["epoch_length"] == steps_of_a_pass * accumulation_steps
    assert plan["iterations"] == 50 * plan["epoch_length"] and plan["warmup_steps"] == 5 * steps_of_a_pass
    assert plan["new_parts_steps"] == 5 * steps_of_a_pass
    few = epoch_plan(**{**asked, "warmup_steps": 2, "new_parts_steps": 1}, scans=scans, batch_size=batch_size)
    assert (few["warmup_steps"], few["new_parts_steps"]) == (2, 1)


def test_the_plan_of_one_scan_is_said_in_the_singular(caplog):
    caplog.set_level("INFO")
    epoch_plan(max_steps=100, val_interval=10, epochs=1, scans=1)
    assert caplog.messages == ["1 epoch of 1 step, each a pass over 1 scan"]


@pytest.mark.parametrize(
    ("batch_size", "processes", "global_batch_size", "iterations"),
    [(2, 1, 2, 1), (2, 1, 8, 4), (2, 4, 8, 1), (1, 3, 12, 4)],
)
def test_iterations_make_up_the_global_batch_size(monkeypatch, batch_size, processes, global_batch_size, iterations):
    monkeypatch.setattr("bundles.common.training.epoch_plan.world_size", lambda: processes)
    asked = {"batch_size": batch_size, "global_batch_size": global_batch_size}
    assert accumulation(**asked, accumulation_steps=1) == iterations


def test_without_a_global_batch_size_the_iterations_are_as_asked():
    assert accumulation(batch_size=2, accumulation_steps=3, global_batch_size=None) == 3


def test_processes_that_do_not_divide_the_global_batch_size_are_refused_with_what_would(monkeypatch):
    monkeypatch.setattr("bundles.common.training.epoch_plan.world_size", lambda: 3)
    with pytest.raises(InputError, match="--global_batch_size 8: 3 processes x --batch_size 2 make 6.*choose 6 or 12"):
        accumulation(batch_size=2, accumulation_steps=1, global_batch_size=8)


def test_two_ways_to_ask_for_accumulation_are_refused():
    with pytest.raises(InputError, match="--accumulation_steps 2 is also set"):
        accumulation(batch_size=2, accumulation_steps=2, global_batch_size=8)


@pytest.mark.parametrize("name", ["batch_size", "accumulation_steps", "global_batch_size"])
def test_batches_are_counted_in_whole_numbers(name):
    with pytest.raises(InputError, match=f"--{name} 1.5 must be a whole number"):
        accumulation(**{"batch_size": 1, "accumulation_steps": 1, "global_batch_size": None, name: 1.5})


def test_a_plan_covers_the_steps_with_less_than_one_step_per_epoch_to_spare():
    for max_steps in range(1, 60):
        for val_interval in range(1, 70):
            plan = epoch_plan(max_steps=max_steps, val_interval=val_interval)
            assert max_steps <= plan["steps"] < max_steps + plan["epochs"]
            assert plan["epoch_length"] <= val_interval


@pytest.mark.parametrize("name", ["max_steps", "val_interval"])
@pytest.mark.parametrize("value", [0, 10.0])
def test_other_than_whole_numbers_from_one_are_refused_by_name_and_value(name, value):
    with pytest.raises(InputError, match=f"--{name} {value} must be a whole number, 1 or more"):
        epoch_plan(**{"max_steps": 10, "val_interval": 10, name: value})


def test_a_warm_up_as_long_as_the_run_is_warned_of(caplog):
    epoch_plan(max_steps=300, val_interval=100, warmup_steps=299)
    assert not caplog.records
    epoch_plan(max_steps=300, val_interval=100, warmup_steps=500)
    assert "warm-up of 500 steps is as long as the run of 300" in caplog.text


def test_new_parts_count_towards_a_warm_up_that_is_too_long(caplog):
    plan = epoch_plan(max_steps=300, val_interval=100, warmup_steps=100, new_parts_steps=199)
    assert plan["new_parts_steps"] == 199 and not caplog.records
    epoch_plan(max_steps=300, val_interval=100, warmup_steps=100, new_parts_steps=200)
    assert "warm-up of 100 steps after 200 of new parts is as long as the run of 300" in caplog.text
