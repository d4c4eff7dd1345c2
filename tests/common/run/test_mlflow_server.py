# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A server that does not answer, goes away or comes back costs points of its curves, and no step of the training."""

from __future__ import annotations

import socket
import time

import mlflow
import pytest
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler, StatsHandler

from bundles.common.run.mlflow_server import FIRST_PAUSE, LastingMLFlowHandler, tolerate_lost_servers


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
