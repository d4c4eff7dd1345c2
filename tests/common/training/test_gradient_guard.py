# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The gradient norm is bounded before the optimiser steps, on unscaled gradients; a step that is not finite leaves no trace."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer

from bundles.common.errors import InputError
from bundles.common.training import gradient_guard
from bundles.common.training.gradient_guard import GradientGuard


class Scaled:
    """Gives a trainer another scaler; MONAI makes its own when the run begins."""

    def __init__(self, scaler):
        self.scaler = scaler

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine, "scaler", self.scaler))


def run(inputs, *, loss=None, accumulation_steps=1, scaler=None, optimizer=None, network=None, **options):
    """Train y = w x, loss y, by SGD with learning rate 1 on inputs x, one at a time; returns the trainer."""
    network = network or torch.nn.Linear(1, 1, bias=False)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader([{"image": torch.tensor([x]), "label": torch.tensor([0.0])} for x in inputs]),
        network=network,
        optimizer=optimizer or torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=loss or (lambda output, label: output.sum()),
        train_handlers=[Scaled(scaler), GradientGuard(**options)],
        amp=scaler is not None,
        accumulation_steps=accumulation_steps,
        decollate=False,
    )
    trainer.run()
    return trainer


def weight(value=0.0):
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, value)
    return network


@pytest.mark.parametrize(("max_norm", "moved_by"), [(0.5, 0.5), (50.0, 30.0), (None, 30.0)])
def test_a_step_moves_no_further_than_the_bound(max_norm, moved_by):
    network = weight()
    trainer = run([30.0], network=network, max_norm=max_norm)
    assert -network.weight.item() == pytest.approx(moved_by, rel=1e-5)
    assert trainer.state.gradient_norm.item() == pytest.approx(30.0)


def test_the_direction_is_kept():
    network = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader([{"image": torch.tensor([3.0, 4.0]), "label": torch.tensor([0.0])}]),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda output, label: output.sum(),
        train_handlers=[GradientGuard(max_norm=1.0)],
        decollate=False,
    )
    trainer.run()
    torch.testing.assert_close(network.weight.detach(), torch.tensor([[-0.6, -0.8]]))


@pytest.mark.filterwarnings("ignore")
def test_scaled_gradients_are_unscaled_before_they_are_measured():
    # a true gradient of norm 0.5 under a loss scale of 1024: clipped before unscaling it would end at 1 / 1024
    network = weight()
    trainer = run([0.5], network=network, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), max_norm=1.0)
    assert -network.weight.item() == pytest.approx(0.5)
    assert trainer.state.gradient_norm.item() == pytest.approx(0.5)


def sgd(network, fused):
    return torch.optim.SGD(network.parameters(), lr=1.0, fused=fused)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_overflows_lowers_its_scale_and_the_step_is_counted(fused):
    network = weight()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer = run([1.0, 8.0, 1.0], network=network, scaler=scaler, optimizer=sgd(network, fused), max_norm=None)
    assert trainer.state.skipped_steps == 1  # 8 x 2^127 is beyond float32
    assert -network.weight.item() == pytest.approx(2.0)
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_weights_and_moments_as_they_were(bad, fused, every, caplog):
    def state_after(inputs):
        network = weight(1.0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
        trainer = run(inputs, network=network, optimizer=optimizer, max_norm=1.0, every=every)
        assert not hasattr(optimizer, "found_inf")
        return trainer, network.weight.item(), copy.deepcopy(optimizer.state_dict()["state"])

    with caplog.at_level(logging.WARNING):
        trainer, value, moments = state_after([1.0, bad, 2.0])
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (1, 0)
    assert "step 2 skipped" in caplog.text
    _, expected, expected_moments = state_after([1.0, 2.0])
    assert value == expected
    assert moments == expected_moments


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_not_finite_is_enough(fused, scaled):
    network = weight()
    losses = iter([1.0, math.inf, 1.0])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    options = {"optimizer": sgd(network, fused), "scaler": scaler, "max_norm": None}
    trainer = run([1.0, 1.0, 1.0], network=network, loss=lambda y, _: y.sum() + next(losses), **options)
    assert trainer.state.skipped_steps == 1
    assert network.weight.item() == pytest.approx(-2.0)


@pytest.mark.parametrize("fused", [False, True])
def test_an_accumulated_step_is_clipped_once_and_left_out_as_a_whole(fused):
    network = weight()
    options = {"optimizer": sgd(network, fused), "accumulation_steps": 2, "max_norm": 1.75, "every": 2}
    trainer = run([1.0, 3.0, math.nan, 1.0, 1.0, 2.0], network=network, **options)
    # steps: mean(1, 3) = 2, bounded to 1.75; left out; mean(1, 2) = 1.5
    assert -network.weight.item() == pytest.approx(1.75 + 1.5, rel=1e-5)
    assert trainer.state.skipped_steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_of_another_process_is_left_out_here_too(fused, monkeypatch):
    """Otherwise the weights of the processes would differ from then on."""
    theirs = iter([1.0, 0.0, 1.0])
    reduce = {torch.distributed.ReduceOp.MIN: torch.minimum, torch.distributed.ReduceOp.MAX: torch.maximum}

    def all_reduce(ours, op):
        ours.copy_(reduce[op](ours, torch.tensor(next(theirs))))

    monkeypatch.setattr(gradient_guard, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    network = weight()
    trainer = run([1.0, 1.0, math.nan], network=network, optimizer=sgd(network, fused), max_norm=None)
    assert trainer.state.skipped_steps == 2 and network.weight.item() == -1.0


def test_too_many_in_a_row_end_the_run_with_advice():
    with pytest.raises(
        InputError, match="3 steps in a row up to step 5.*--learning_rate.*--check_data full.*--amp false"
    ):
        run([1.0, 1.0] + 5 * [math.nan], network=weight(), max_norm=1.0, max_skipped_steps=3)


def test_good_steps_in_between_start_the_count_anew():
    trainer = run([math.nan, 1.0, math.nan, 1.0, math.nan, 1.0], network=weight(), max_norm=1.0, max_skipped_steps=2)
    assert trainer.state.skipped_steps == 3


def test_a_fused_optimiser_is_read_every_few_steps_and_the_same_is_counted(caplog):
    inputs = [math.nan, 1.0, math.nan, math.nan, 1.0, math.inf, math.nan]
    counts = {}
    for fused, every in ((False, 1), (True, 1), (True, 3), (True, 100)):
        network = weight()
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            trainer = run(inputs, network=network, optimizer=sgd(network, fused), max_norm=1.0, every=every)
        said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        state = trainer.state
        counts[fused, every] = (state.skipped_steps, state.skipped_in_a_row, network.weight.item(), tuple(said))
    assert len(set(counts.values())) == 1
    steps, in_a_row, value, said = counts[True, 100]
    assert (steps, in_a_row) == (5, 2) and value == pytest.approx(-2.0, rel=1e-5)
    assert said[-1].startswith("step 7 skipped: loss nan") and said[-1].endswith("(2 in a row, 5 in total)")


@pytest.mark.parametrize("every", [1, 4, 100])
def test_the_run_ends_at_most_one_reading_late_and_its_weights_stay_sound(every):
    network = weight(1.0)
    seen = []
    inputs = [1.0, 1.0] + 10 * [math.nan]
    options = {"optimizer": sgd(network, True), "max_norm": 1.0, "max_skipped_steps": 3, "every": every}
    with pytest.raises(InputError, match="3 steps in a row up to step 5"):
        run(inputs, network=network, loss=lambda y, _: (seen.append(1), y.sum())[1], **options)
    assert len(seen) == {1: 5, 4: 8, 100: 12}[every]
    assert network.weight.item() == pytest.approx(-1.0, rel=1e-5)


def test_what_was_left_out_is_known_when_an_epoch_ends_and_when_the_engine_is_terminated():
    class Look:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(engine.state.skipped_in_a_row))
            engine.add_event_handler(Events.TERMINATE, lambda engine: seen.append(engine.state.skipped_in_a_row))
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate())

    seen: list[int] = []
    network = weight()
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        epoch_length=3,
        train_data_loader=DataLoader([{"image": torch.tensor([math.nan]), "label": torch.tensor([0.0])}] * 6),
        network=network,
        optimizer=sgd(network, True),
        loss_function=lambda output, label: output.sum(),
        train_handlers=[GradientGuard(max_norm=1.0, every=100), Look()],
        decollate=False,
    ).run()
    assert seen[:2] == [3, 5]


def test_a_gradient_without_a_bound_is_left_as_it_is():
    network = weight()
    trainer = run([1e30], network=network, max_norm=None)
    assert network.weight.item() == pytest.approx(-1e30, rel=1e-6)
    assert trainer.state.gradient_norm.item() == pytest.approx(1e30, rel=1e-6)


def test_by_default_every_step_is_read_and_twenty_skipped_ones_in_a_row_end_the_run():
    network = weight()
    seen = []
    with pytest.raises(InputError, match="20 steps in a row up to step 21"):
        run(
            [1.0] + 30 * [math.nan],
            network=network,
            optimizer=sgd(network, True),
            loss=lambda y, _: (seen.append(1), y.sum())[1],
            max_norm=1.0,
        )
    assert len(seen) == 21
