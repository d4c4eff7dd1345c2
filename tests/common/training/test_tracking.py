# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Curves and pictures stand in TensorBoard and MLflow over steps, with the values of the run."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from matplotlib.image import imsave
from monai.handlers import MLFlowHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundles.common.run.mlflow_server import mlflow_handler, tolerate_lost_servers
from bundles.common.run.options import RunSettings
from bundles.common.training.log import LogEvents
from bundles.common.training.tracking import Tracking, run_parameters


def run(
    folder,
    *,
    validates=True,
    moves=False,
    tensorboard=True,
    uri=None,
    first=0,
    iterations=6,
    accumulation_steps=1,
    resume=False,
    own_curves=False,
    **options,
):
    """A row per step with loss = step, a validation of accuracy = step / 10 every three steps, and one picture."""
    trainer = Engine(lambda engine, batch: [{"loss": torch.tensor(0.0)}])
    trainer.accumulation_steps = accumulation_steps
    trainer.register_events(*LogEvents)
    evaluator = Engine(lambda engine, batch: None)

    @trainer.on(Events.ITERATION_COMPLETED(every=accumulation_steps))
    def log(engine):
        step = engine.state.iteration // accumulation_steps
        engine.state.log_row = {"step": step, "loss": float(step), "learning_rate": 0.5}
        engine.fire_event(LogEvents.ROW)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        evaluator.run([0])
        evaluator.state.metrics = {"accuracy": engine.state.iteration // accumulation_steps / 10}
        imsave(folder / "panel.png", np.full((8, 12, 3), engine.state.iteration, np.uint8))

    @trainer.on(Events.EPOCH_COMPLETED)
    def move(engine):
        if moves:
            distance = engine.state.iteration / 100
            engine.state.moved = {"cosine": {"swinViT.layers1": 0.9}, "distance": {"decoder1": distance}}

    @trainer.on(Events.STARTED)
    def continue_from(engine):
        engine.state.iteration, engine.state.epoch = first, first // 3

    Tracking(
        output_dir=str(folder),
        tensorboard=tensorboard,
        evaluator=evaluator if validates else None,
        pictures=["panel.png", "absent.png"],
        resume=resume,
        **options,
    ).attach(trainer)
    if uri:
        logs = {"epoch_log": own_curves, "iteration_log": own_curves}
        for engine in (trainer, evaluator):
            handler = MLFlowHandler(tracking_uri=uri, experiment_name="e", output_transform=lambda out: 7.0, **logs)
            tolerate_lost_servers([handler])[0].attach(engine)
    length = 3 * accumulation_steps
    trainer.run(range(length), max_epochs=iterations // length, epoch_length=length)
    return trainer


def events(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def points(accumulator, name):
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(name)]


def test_tensorboard_holds_curves_and_pictures_by_step(tmp_path):
    run(tmp_path)
    seen = events(tmp_path)
    assert points(seen, "train/loss") == [(step, step) for step in range(1, 7)]
    assert set(seen.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "validation/accuracy"}
    assert points(seen, "validation/accuracy") == [(3, 0.3), (6, 0.6)]
    assert [(event.step, event.height, event.width) for event in seen.Images("panel")] == [(3, 8, 12), (6, 8, 12)]


@pytest.mark.parametrize("validates", [True, False])
def test_the_movement_is_a_curve_per_part_also_without_a_validation(tmp_path, validates):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    trainer = run(tmp_path, moves=True, validates=validates, uri=uri)
    seen = events(tmp_path)
    assert points(seen, "weights_moved/distance/decoder1") == [(3, 0.03), (6, 0.06)]
    assert points(seen, "weights_moved/cosine/swinViT.layers1") == [(3, 0.9), (6, 0.9)]
    assert ("validation/accuracy" in seen.Tags()["scalars"]) == validates
    client, run_id = mlflow.MlflowClient(uri), mlflow_handler(trainer).cur_run.info.run_id
    history = client.get_metric_history(run_id, "weights_moved/distance/decoder1")
    assert sorted((metric.step, metric.value) for metric in history) == [(3, 0.03), (6, 0.06)]


def test_steps_are_counted_and_not_iterations(tmp_path):
    run(tmp_path, iterations=12, accumulation_steps=2)
    assert points(events(tmp_path), "validation/accuracy") == [(3, 0.3), (6, 0.6)]


def test_a_resumed_run_replaces_what_a_killed_one_wrote_beyond_it(tmp_path):
    run(tmp_path)
    run(tmp_path, first=3, iterations=9)
    assert [step for step, _ in points(events(tmp_path), "train/loss")] == list(range(1, 10))


def test_nothing_is_written_unless_asked_for(tmp_path):
    run(tmp_path, tensorboard=False)
    assert [path.name for path in tmp_path.iterdir()] == ["panel.png"]


def test_mlflow_holds_the_same_and_the_pictures_as_artefacts(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    trainer = run(tmp_path, uri=uri, tensorboard=False)
    client, run_id = mlflow.MlflowClient(uri), mlflow_handler(trainer).cur_run.info.run_id
    history = client.get_metric_history(run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, step) for step in range(1, 7)]
    history = client.get_metric_history(run_id, "validation/accuracy")
    assert sorted((metric.step, metric.value) for metric in history) == [(3, 0.3), (6, 0.6)]
    kept = [artifact.path for artifact in client.list_artifacts(run_id, "pictures/step_000006")]
    assert kept == ["pictures/step_000006/panel.png"]


def test_an_engine_without_mlflow_has_no_handler_of_it(tmp_path):
    assert mlflow_handler(run(tmp_path, tensorboard=False)) is None


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("bundles.common.training.tracking.rank", lambda: 1)
    run(tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_a_fresh_run_has_a_run_of_its_own_and_a_resumed_one_goes_on(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlruns.db"

    def run_id(**options):
        return mlflow_handler(run(tmp_path, uri=uri, tensorboard=False, **options)).cur_run.info.run_id

    first, second = run_id(), run_id()  # neither is marked as finished
    assert first != second == run_id(first=3, iterations=9, resume=True)
    client = mlflow.MlflowClient(uri)
    assert [metric.step for metric in client.get_metric_history(first, "train/loss")] == list(range(1, 7))
    assert sorted({metric.step for metric in client.get_metric_history(second, "train/loss")}) == list(range(1, 10))


def test_each_metric_stands_once_also_where_monais_handlers_would_write_it_again(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    trainer = run(tmp_path, uri=uri, tensorboard=False, own_curves=True)
    client, run_id = mlflow.MlflowClient(uri), mlflow_handler(trainer).cur_run.info.run_id
    assert set(client.get_run(run_id).data.metrics) == {"train/loss", "train/learning_rate", "validation/accuracy"}
    assert len(client.search_runs(client.get_experiment_by_name("e").experiment_id)) == 1


def test_parameters_are_those_of_the_run_and_files_of_its_end_are_kept(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    (tmp_path / "split.json").write_text("{}")
    options = {"parameters": {"seed": 3, "roi_size": [64, 64, 32]}, "at_the_end": ["split.json", "absent.png"]}
    trainer = run(tmp_path, uri=uri, tensorboard=False, **options)
    client, run_id = mlflow.MlflowClient(uri), mlflow_handler(trainer).cur_run.info.run_id
    params = client.get_run(run_id).data.params
    assert (params["seed"], params["roi_size"]) == ("3", "64, 64, 32")
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["pictures", "split.json"]


def test_parameters_name_options_network_start_and_versions(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text('{"version": "0.2.0"}')
    options = {
        "settings": RunSettings({"seed": 3, "learning_rate": 0.1}),
        "encoder": {"depths": [2, 2]},
        "network": torch.nn.Linear(3, 2),
        "bundle_root": str(tmp_path),
    }
    found = run_parameters(**options, start={"file": "encoder.pt"}, preset="cpu")
    assert found | {"monai_version": 0, "torch_version": 0} == {
        **{"preset": "cpu", "seed": 3, "learning_rate": 0.1, "encoder_depths": [2, 2], "start": "encoder.pt"},
        **{"network": "Linear, 8 parameters", "bundle_version": "0.2.0", "monai_version": 0, "torch_version": 0},
    }
    assert run_parameters(**options, start=None)["start"] == "scratch"


def test_a_new_run_sets_the_pictures_of_an_earlier_one_aside(tmp_path):
    imsave(tmp_path / "absent.png", np.full((4, 4, 3), 9, np.uint8))  # of a task that is off now
    old = (tmp_path / "absent.png").read_bytes()
    run(tmp_path)
    assert "absent" not in events(tmp_path).Tags()["images"]
    assert (tmp_path / "previous_absent.png").read_bytes() == old and not (tmp_path / "absent.png").exists()
    run(tmp_path, first=3, resume=True)
    assert (tmp_path / "panel.png").exists() and not (tmp_path / "previous_panel.png").exists()
