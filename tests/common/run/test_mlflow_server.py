# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A server that does not answer, goes away or comes back costs points of its curves, and no step of the training."""

from __future__ import annotations

import socket
import time

import mlflow
import pytest
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler, StatsHandler

from bundles.common.run import mlflow_server
from bundles.common.run.mlflow_server import FIRST_PAUSE, LastingMLFlowHandler, name_run, tolerate_lost_servers


def handler(uri: str) -> LastingMLFlowHandler:
    options = {"tracking_uri": uri, "experiment_name": "e", "run_name": "r", "close_on_complete": False}
    (made,) = tolerate_lost_servers([MLFlowHandler(**options, output_transform=lambda loss: loss)])
    return made


def train(made: LastingMLFlowHandler, steps: int = 4) -> Engine:
    trainer = Engine(lambda engine, batch: float(batch))
    made.attach(trainer)
    trainer.run(range(steps))
    return trainer


def ours(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("bundles")]


@pytest.fixture
def local(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/mlruns.db"


def points(uri: str) -> list[int]:
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(client.get_experiment_by_name("e").experiment_id)
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "Loss")]


def test_a_server_that_is_there_gets_every_point(local, caplog):
    train(handler(local))
    assert points(local) == [1, 2, 3, 4] and not ours(caplog)


def test_no_server_costs_one_warning_and_no_step(monkeypatch, caplog):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert train(handler(uri)).state.iteration == 4
    (warning,) = ours(caplog)
    assert uri in warning and "goes on without it and tries again in 60 s" in warning


def test_a_server_that_never_answers_is_not_waited_for_by_mlflows_own_patience(monkeypatch):
    """Seven retries of two minutes: half an hour at each point."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        made = handler(f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("bundles.common.run.mlflow_server.PATIENCE", {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1"})
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        began = time.monotonic()
        assert train(made, steps=50).state.iteration == 50
    assert time.monotonic() - began < 10


def test_it_is_tried_again_after_a_while_and_goes_on_where_it_comes_back(local, monkeypatch, caplog):
    made, now = handler(local), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    away = {"away": True}
    real = made.client.log_batch

    def log_batch(*arguments, **options):
        if away["away"]:
            raise ConnectionError("refused\nand more")
        return real(*arguments, **options)

    monkeypatch.setattr(made.client, "log_batch", log_batch)
    trainer = Engine(lambda engine, batch: float(batch))
    made.attach(trainer)

    def step(engine: Engine) -> None:
        now[0] = 40.0 * engine.state.iteration  # pauses of 60 s, then 120 s: attempts at 0, 80, 200 s
        away["away"] = engine.state.iteration < 5

    trainer.add_event_handler(Events.ITERATION_STARTED, step)
    trainer.run(range(8))
    assert points(local) == [5, 6, 7, 8]
    first, second = ours(caplog)
    assert "(refused)" in first and "in 60 s" in first
    assert "(refused)" in second and "in 120 s" in second
    assert made.pause == FIRST_PAUSE  # it is back: the next failure starts anew


def test_only_handlers_of_mlflow_are_changed(local):
    other = StatsHandler()
    first, second = tolerate_lost_servers([other, handler(local)])
    assert first is other and type(first) is StatsHandler and type(second) is LastingMLFlowHandler
    assert tolerate_lost_servers(None) == []


def started(uri: str) -> LastingMLFlowHandler:
    made = handler(uri)
    assert made.started(Engine(lambda engine, batch: None))
    return made


def test_parameters_are_written_in_words_and_once(local):
    made = started(local)
    assert made.log_parameters({"rates": [0.1, 0.2], "labels": {"1": "liver"}, "seed": 0})
    assert made.log_parameters({"seed": 1, "long": "x" * 10_000})  # a resumed run: MLflow refuses another value
    written = made.client.get_run(made.cur_run.info.run_id).data.params
    ours_of = {name: value for name, value in written.items() if name not in ("max_epochs", "epoch_length")}
    assert ours_of == {"rates": "0.1, 0.2", "labels": "1: liver", "seed": "0", "long": "x" * 6000}


def test_a_run_with_curves_of_its_own_has_none_of_monais(local):
    made = handler(local)
    made.own_curves = False
    train(made)
    assert points(local) == []


def test_the_address_is_a_command_for_a_database_and_the_page_of_a_server(local, monkeypatch):
    made = started(local)
    assert made.address() == f"mlflow ui --backend-store-uri {local}, then http://127.0.0.1:5000"
    monkeypatch.setattr(mlflow_server, "find_spec", lambda name: None)
    assert made.address().endswith(
        ":5000 (the page is not installed: Run `make install EXTRAS=mlflow` in the project's folder, or `pip install mlflow`.)"
    )
    run = made.cur_run.info
    monkeypatch.setattr(type(made.client), "tracking_uri", "http://tracking:5000/")
    assert made.address() == f"http://tracking:5000/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    made.cur_run = None  # the server never answered
    assert made.address() == "http://tracking:5000/"


def test_a_run_is_named_after_its_folder_and_a_resumed_one_takes_the_noted_name(local, tmp_path):
    first, second, resumed, given = (handler(local) for _ in range(4))
    for made in (first, second, resumed):
        made.run_name = None
    name_run(tmp_path / "spleen", first)
    name_run(tmp_path / "spleen", second, name="other")
    name_run(tmp_path / "spleen", resumed, None, resume=True)
    name_run(tmp_path / "spleen", given)
    assert first.run_name.startswith("spleen_") and second.run_name.startswith("other_")
    assert resumed.run_name == second.run_name and given.run_name == "r"
    name_run(tmp_path / "untracked", None)
    assert not (tmp_path / "untracked").exists()
