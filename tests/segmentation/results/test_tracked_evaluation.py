# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A tracked evaluation is an MLflow run with scores, parameters, tables and pictures; an untracked one costs nothing."""

from __future__ import annotations

import mlflow
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

from bundles.common.run.mlflow_server import tolerate_lost_servers
from bundles.segmentation.results.tracked_evaluation import TrackedEvaluation


def evaluate(folder, uri=None) -> None:
    evaluator = Engine(lambda engine, batch: None)

    @evaluator.on(Events.EPOCH_COMPLETED)
    def scored(engine):
        engine.state.metrics = {"mean_dice": 0.5, "dice_liver": 0.25}
        (folder / "site1").mkdir(parents=True, exist_ok=True)
        for name in ("scores.csv", "scores.png", "a_overlay.png", "site1/b_overlay.png", "other.txt"):
            (folder / name).write_text(name)

    TrackedEvaluation(output_dir=str(folder), parameters={"spacing": [1.5, 1.5, 2.0]}).attach(evaluator)
    if uri:
        made = MLFlowHandler(tracking_uri=uri, experiment_name="e", iteration_log=False, close_on_complete=True)
        tolerate_lost_servers([made])[0].attach(evaluator)
    evaluator.run([0])


def files(client, run_id, folder=None) -> list[str]:
    found = client.list_artifacts(run_id, folder)
    return [path for one in found for path in (files(client, run_id, one.path) if one.is_dir else [one.path])]


def test_a_tracked_evaluation_is_a_run_with_all_that_it_found(tmp_path, caplog):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    with caplog.at_level("INFO", logger="bundles"):
        evaluate(tmp_path / "spleen" / "evaluation", uri)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(client.get_experiment_by_name("e").experiment_id)
    assert run.info.run_name.startswith("spleen_evaluation_") and run.info.status == "FINISHED"
    assert run.data.metrics == {"mean_dice": 0.5, "dice_liver": 0.25}
    assert run.data.params["spacing"] == "1.5, 1.5, 2.0"
    pictures = ["pictures/a_overlay.png", "pictures/site1/b_overlay.png"]
    assert files(client, run.info.run_id) == [*pictures, "scores.csv", "scores.png"]
    assert f"mlflow ui --backend-store-uri {uri}" in caplog.messages[-1]


def test_a_second_evaluation_has_a_run_of_its_own(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    for _ in range(2):
        evaluate(tmp_path / "evaluation", uri)
    client = mlflow.MlflowClient(uri)
    assert len(client.search_runs(client.get_experiment_by_name("e").experiment_id)) == 2


def test_without_tracking_nothing_is_written_or_said(tmp_path, caplog):
    with caplog.at_level("INFO", logger="bundles"):
        evaluate(tmp_path)
    assert not (tmp_path / ".mlflow_run_name").exists() and not [
        one for one in caplog.records if one.name.startswith("bundles")
    ]
