# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The learning rate advances once per step, however many iterations a step has."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.optimizers import WarmupCosineSchedule

from bundles.common.errors import InputError
from bundles.common.training.lr_schedule import CosineToFloor, StepSchedule


class Rates:
    def __init__(self):
        self.seen = []

    def attach(self, engine):
        engine.add_event_handler(
            Events.ITERATION_STARTED, lambda e: self.seen.append(e.optimizer.param_groups[0]["lr"])
        )


def rates(accumulation_steps):
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=2, t_total=6)
    seen = Rates()
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        epoch_length=2 * accumulation_steps,
        train_data_loader=DataLoader([{"image": torch.zeros(1), "label": torch.zeros(1)}] * 2 * accumulation_steps),
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.L1Loss(),
        train_handlers=[seen, StepSchedule(lr_scheduler=schedule)],
        accumulation_steps=accumulation_steps,
        decollate=False,
    ).run()
    return seen.seen, optimizer.param_groups[0]["lr"]


def test_warm_up_and_cosine_by_step():
    seen, last = rates(1)
    # linear from 0 over two steps, then half a cosine over four
    assert seen == pytest.approx([0.0, 0.5, 1.0, 0.8535534, 0.5, 0.1464466])
    assert last == pytest.approx(0.0)


def test_iterations_of_one_step_share_its_rate():
    one, _ = rates(1)
    three, last = rates(3)
    assert three == [rate for rate in one for _ in range(3)]
    assert last == pytest.approx(0.0)


def test_without_a_floor_it_is_monais_schedule_at_every_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    monai = WarmupCosineSchedule(optimizer, warmup_steps=13, t_total=101)
    for warmup in (0, 13):
        monai.warmup_steps = warmup
        own = CosineToFloor(optimizer, warmup_steps=warmup, t_total=101, learning_rate=0.7, end_learning_rate=0.0)
        expected = [monai.lr_lambda(step) for step in range(102)]
        assert [own.factor(step, starts_anew=True) for step in range(102)] == expected


def floored(rates_of_groups, **options):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates_of_groups]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = CosineToFloor(optimizer, warmup_steps=2, t_total=6, **options)
    seen = []
    for _ in range(7):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen, schedule


def test_each_group_ends_at_the_same_share_of_its_own_rate():
    seen, _ = floored([0.4, 0.1], learning_rate=0.4, end_learning_rate=0.08)
    # half a cosine over four steps is 1, 0.854, 0.5, 0.146, 0; the floor is a fifth
    expected = [0.0, 0.5, 1.0, 0.8535534, 0.5, 0.2, 0.2]
    assert [fast for fast, _ in seen] == pytest.approx([0.4 * share for share in expected])
    assert [slow for _, slow in seen] == pytest.approx([0.1 * share for share in expected])


def test_without_a_floor_it_is_monais_schedule():
    seen, _ = floored([1.0], learning_rate=1.0, end_learning_rate=0.0)
    assert [rate for (rate,) in seen[:6]] == pytest.approx(rates(1)[0])


def test_a_rate_that_would_rise_is_refused():
    with pytest.raises(InputError, match="--end_learning_rate 0.1 is above --learning_rate 0.01"):
        floored([0.01], learning_rate=0.01, end_learning_rate=0.1)


OPTIONS = {"warmup_steps": 3, "t_total": 14, "learning_rate": 0.4, "end_learning_rate": 0.04, "new_parts_steps": 4}


def in_two_groups(*, anew=(False, True), **options):
    groups = [
        {"params": [torch.nn.Parameter(torch.full((3,), 1.5))], "lr": rate, "starts_anew": each}
        for rate, each in zip((0.1, 0.4), anew, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.4, weight_decay=0.1, fused=True)
    return optimizer, CosineToFloor(optimizer, **{**OPTIONS, **options})


def follow(optimizer, schedule, steps=14):
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
        schedule.step()
    return seen


# two steps up, half a cosine over two down; then three up, and half a cosine over seven, not below a tenth
ALONE = [0.0, 0.5, 1.0, 0.5]
TOGETHER = [0.0, 1 / 3, 2 / 3, 1.0, 0.9504844, 0.8117449, 0.6112605, 0.3887395, 0.1882551, 0.1]


def test_new_parts_rise_and_fall_alone_and_then_all_rise_together():
    seen = follow(*in_two_groups())
    assert [kept for kept, _ in seen] == pytest.approx([0.1 * share for share in [0.0] * 4 + TOGETHER])
    assert [new for _, new in seen] == pytest.approx([0.4 * share for share in ALONE + TOGETHER])


def test_in_the_first_phase_kept_weights_do_not_change_in_a_single_bit_but_their_moments_do():
    optimizer, schedule = in_two_groups()
    (kept,), (new,) = (group["params"] for group in optimizer.param_groups)
    with torch.no_grad():
        kept.copy_(torch.tensor([0.1, -3e7, 1e-30]))
    before = kept.detach().clone()
    follow(optimizer, schedule, steps=5)  # the fifth step is the first of the warm-up, with a rate of 0
    assert torch.equal(kept.view(torch.int32), before.view(torch.int32))
    assert not torch.equal(new, torch.full((3,), 1.5))
    assert optimizer.state[kept]["step"] == 5 and (optimizer.state[kept]["exp_avg_sq"] > 0).all()
    follow(optimizer, schedule, steps=1)
    assert not torch.equal(kept, before)


@pytest.mark.parametrize("anew", [(True, True), (False, False)])
def test_from_scratch_and_with_nothing_new_all_steps_are_the_usual_schedules(anew, caplog):
    caplog.set_level(logging.INFO)
    seen = follow(*in_two_groups(anew=anew))
    assert "--new_parts_steps 4 has no effect" in caplog.text
    assert ("start anew" in caplog.text) == anew[0]
    assert seen == follow(*in_two_groups(anew=anew, new_parts_steps=0))
    assert seen[3] == pytest.approx([0.1, 0.4])  # all are at their peak after the warm-up of the run


@pytest.mark.parametrize("stopped_after", [1, 3, 4, 5, 9])
def test_a_resumed_schedule_goes_on_in_either_phase(stopped_after):
    unbroken = follow(*in_two_groups())
    optimizer, schedule = in_two_groups()
    follow(optimizer, schedule, steps=stopped_after)
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer, schedule = in_two_groups(anew=(True, True))  # as if the start file were not given again
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    for group in optimizer.param_groups:  # as TrainingCheckpoint does where a setting was changed
        group["starts_anew"] = True
    assert follow(optimizer, schedule, steps=14 - stopped_after) == unbroken[stopped_after:]


def test_a_phase_as_long_as_the_run_is_refused():
    in_two_groups(new_parts_steps=13)
    for anew in ((False, True), (True, True)):
        with pytest.raises(InputError, match="--new_parts_steps 14 is not below the 14 steps"):
            in_two_groups(new_parts_steps=14, anew=anew)


def test_a_cosine_of_a_single_step_ends_at_the_floor():
    _, schedule = in_two_groups(anew=(True, True), warmup_steps=13, end_learning_rate=0.0)
    assert [schedule.factor(step, starts_anew=True) for step in (13, 14)] == [1.0, 0.0]


def test_a_run_whose_parts_are_one_group_has_no_first_phase(caplog):
    caplog.set_level(logging.INFO)
    schedule = CosineToFloor(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4), **OPTIONS)
    assert "all trained parts start anew: --new_parts_steps 4 has no effect" in caplog.text
    assert schedule.first_phase == 0
