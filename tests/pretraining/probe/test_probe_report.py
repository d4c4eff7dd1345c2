# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The table, the metrics and the log of a run, of a resumed one and of one that was killed."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events

from bundles.common.errors import InputError
from bundles.common.training.log import read_log
from bundles.pretraining.probe.features import intensities
from bundles.pretraining.probe.probe_report import ProbeReport


class Network(torch.nn.Module):
    """Its weight is the number of steps that it was trained for."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def features(self, x):
        return [x * 0 + self.steps]


class Probe:
    """Measures 0.1 on intensities, and 0.2 and 0.01 per step on features."""

    def measure(self, extract):
        features = extract(torch.zeros(1, 1, 1, 1, 1))
        value = 0.1 if extract is intensities else 0.2 + 0.01 * float(features[1])
        return {"probe_dice": value, "probe_dice_liver": 2 * value}


def run(folder, *, epochs=3, identity=("a",), first=0, stopped_in=None, accumulation=1, refuse=False, again=False):
    """A training of two steps per epoch; return the metrics of the validation after each epoch."""
    network, metrics = Network(), []
    evaluator = SimpleNamespace(state=SimpleNamespace(metrics={}), amp=False, amp_kwargs={})
    length = 2 * accumulation

    def step(engine, batch):
        network.steps += 1 / accumulation

    engine = Engine(step)
    engine.accumulation_steps = accumulation

    @engine.on(Events.EPOCH_COMPLETED)
    def validate(engine):  # a signal in the middle of it ends the run
        if engine.state.epoch == stopped_in:
            engine.terminate(skip_completed=True)

    report = ProbeReport(
        probe=Probe(),
        network=network,
        evaluator=evaluator,
        output_dir=str(folder),
        identity=list(identity),
    )
    report.attach(engine)

    @engine.on(Events.STARTED)
    def continue_from_last(engine):  # as TrainingCheckpoint does, after the handlers before it
        if refuse:
            raise InputError("other settings")
        network.steps.fill_(first)
        engine.state.iteration, engine.state.epoch = first * accumulation, first // 2
        if again:
            engine.fire_event(Events.EPOCH_COMPLETED)

    @engine.on(Events.EPOCH_COMPLETED)
    def keep(engine):
        metrics.append(dict(evaluator.state.metrics))

    engine.run([0] * length, max_epochs=epochs, epoch_length=length)
    return metrics


def column(folder, name):
    return [row[name] for row in read_log(folder / "probe.csv")]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_validation_gets_the_dice_and_the_table_a_row(tmp_path, caplog, accumulation):
    with caplog.at_level(logging.INFO):
        metrics = run(tmp_path, accumulation=accumulation)
    assert [each["probe_dice"] for each in metrics] == pytest.approx([0.22, 0.24, 0.26], abs=1e-6)
    assert [each["probe_dice_liver"] for each in metrics] == pytest.approx([0.44, 0.48, 0.52], abs=1e-6)
    assert column(tmp_path, "step") == [0, 2, 4, 6]
    assert column(tmp_path, "probe_dice") == pytest.approx([0.2, 0.22, 0.24, 0.26], abs=1e-6)
    assert column(tmp_path, "intensity_alone") == [0.1] * 4
    assert (tmp_path / "probe_curve.png").stat().st_size > 5000
    assert "probe before training: Dice 0.200; intensity alone 0.100" in caplog.text
    assert "probe at step 4: Dice 0.240; before training 0.200, intensity alone 0.100" in caplog.text


def test_a_resumed_run_continues_the_table_of_the_unbroken_one(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "resumed", epochs=1)
    run(tmp_path / "resumed", first=2)
    for name in ("step", "probe_dice", "probe_dice_liver", "intensity_alone", "probe"):
        assert column(tmp_path / "resumed", name) == column(tmp_path / "whole", name)


def test_before_training_is_measured_with_the_weights_before_the_checkpoint_is_loaded(tmp_path):
    run(tmp_path, first=4)
    assert column(tmp_path, "step") == [0, 6]
    assert column(tmp_path, "probe_dice") == pytest.approx([0.2, 0.26], abs=1e-6)


def test_rows_after_the_step_of_a_resumed_run_are_replaced(tmp_path):
    run(tmp_path)  # killed after its probe at step 6, with a last.pt of step 2
    run(tmp_path, epochs=2, first=2)
    assert column(tmp_path, "step") == [0, 2, 4]


def test_rows_of_another_run_or_another_probe_are_dropped(tmp_path):
    run(tmp_path)
    first = (tmp_path / "probe.csv").read_text()
    run(tmp_path, epochs=1)
    assert column(tmp_path, "step") == [0, 2]
    assert (tmp_path / "previous_probe.csv").read_text() == first and (tmp_path / "previous_probe_curve.png").exists()
    second = (tmp_path / "probe.csv").read_text()
    run(tmp_path, epochs=2, first=2, identity=("b",))
    assert column(tmp_path, "step") == [0, 4]
    assert (tmp_path / "previous_probe.csv").read_text() == second


def test_an_interrupted_validation_is_not_probed(tmp_path):
    run(tmp_path, stopped_in=2)
    assert column(tmp_path, "step") == [0, 2]


def test_a_resume_that_is_refused_leaves_the_table_as_it_is(tmp_path):
    run(tmp_path)
    before = (tmp_path / "probe.csv").read_text()
    with pytest.raises(InputError):
        run(tmp_path, first=6, identity=("b",), refuse=True)
    assert (tmp_path / "probe.csv").read_text() == before


def test_rows_of_lost_steps_are_dropped_before_the_next_validation(tmp_path):
    run(tmp_path)
    run(tmp_path, first=2, stopped_in=2)
    assert column(tmp_path, "step") == [0, 2]


def test_a_validation_that_is_repeated_on_resume_replaces_its_row(tmp_path):
    run(tmp_path, epochs=2)
    run(tmp_path, first=4, again=True)
    assert column(tmp_path, "step") == [0, 2, 4, 6]
