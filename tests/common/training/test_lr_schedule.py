# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The learning rate advances once per step, however many iterations a step has."""

from __future__ import annotations

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
