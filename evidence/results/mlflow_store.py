# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Log every run of a study, and the tables of its report, to MLflow. Each folder of a study has its own experiment.

A run has its facts and options as parameters, and its mean scores (a pre-training: its validation figures) and its
training curve as metrics. A repeated run replaces the one before. The run ``report`` has the outline, tables and
pictures of the study as artifacts. MLflow is for viewing only: the report is drawn from the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from bundles.common.errors import InputError
from bundles.common.files import file_hash, folder_lock, write_text
from bundles.common.training.log import read_log

from .paired_bootstrap import figure_of
from .records import METRICS, OUTLINE, figures_of_done, read_done, table_of

RUN_TAG, DIGEST_TAG = "evidence.run", "evidence.digest"
STUDY_TAG, FOLDER_TAG = "evidence.study.study", "evidence.folder"
LOCK, IDENTITY = ".tracking.lock", ".study_id"
ARTIFACTS = "mlartifacts"  # folder of the artifacts, unless a server stores them
REPORT = "report"
REPORT_FILES = (
    OUTLINE,
    "carried.md",
    *(
        f"{table}.{kind}"
        for table in ("power", "curve", "headroom", "ablation", "search")
        for kind in ("csv", "md", "png")
    ),
)
BATCH = 900  # metrics per request; MLflow accepts 1000
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


def tracking_store(out: Path) -> str:
    """Return the default MLflow store of a study's folder."""
    return f"sqlite:///{(out / 'mlruns.db').as_posix()}"


def experiment_name(study: str) -> str:
    """Return the experiment of a study. Further folders of the same study append their identity."""
    return f"evidence_{study}"


def open_store(uri: str, *, out: Path) -> Any:
    """Return the client of an MLflow store that has answered.

    Args:
        uri: MLflow store; a database that does not exist is created, but not its folder.
        out: folder of the study to log.

    Raises:
        InputError: the store does not exist or does not answer.
    """
    path = _file_of(uri)
    if path is not None and not path.parent.exists():
        raise InputError(f"MLflow store {uri} cannot be opened: {path.parent} does not exist. Check --tracking_uri.")
    try:
        with folder_lock(out / LOCK), _few_retries():
            client = _client(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # depends on the kind of store: connection refused, not a database, ...
        raise InputError(f"MLflow store {uri} cannot be opened: {_first_line(error)}. Check --tracking_uri.") from None
    return client


def log_missing(out: Path, *, outline: Mapping[str, Any], uri: str, say: Callable[[str], None]) -> None:
    """Log the finished runs of a study's folder that the store does not have, or has with other results.

    A run that was repeated after its folder was removed replaces the one before.

    Args:
        out: folder of the study.
        outline: outline of the plan.
        uri: MLflow store.
        say: gets a line if there is something to log.

    Raises:
        InputError: the store cannot be written.
    """
    with _writing(uri, out, "Nothing is lost: repeat the command to log what is missing.") as client:
        experiment = _experiment(client, outline["study"], out, uri)
        logged = {
            (run.data.tags.get(RUN_TAG), run.data.tags.get(DIGEST_TAG))
            for run in _all_runs(client, experiment)
            if run.info.status == "FINISHED"
        }
        found = {folder: read_done(folder) for folder in sorted((out / "runs").glob("*")) if folder.is_dir()}
        missing = {
            folder: done for folder, done in found.items() if done and (folder.name, _digest(done)) not in logged
        }
        if missing:
            say(f"logging {len(missing)} finished runs that are missing in {uri}")
        for folder, done in missing.items():
            _log(client, experiment, folder.name, done, outline=outline, out=out)


def log_report(out: Path, *, study: str, uri: str, say: Callable[[str], None]) -> None:
    """Log the outline, tables and pictures in a study's folder as artifacts of the run ``report``.

    Args:
        out: folder of the study.
        study: name of the study.
        uri: MLflow store.
        say: gets a line if the artifacts cannot be written.

    Raises:
        InputError: the store cannot be written.
    """
    files = [out / name for name in REPORT_FILES if (out / name).is_file()]
    content = {path.name: file_hash(path) for path in files}
    with _writing(uri, out, f"The report is in {out}.") as client:
        experiment, tags = _experiment(client, study, out, uri), {RUN_TAG: REPORT, DIGEST_TAG: _digest(content)}
        before = _find(client, experiment, REPORT)
        if len(before) == 1 and before[0].data.tags.get(DIGEST_TAG) == tags[DIGEST_TAG]:
            return
        for old in before:
            client.delete_run(old.info.run_id)
        run = client.create_run(experiment, run_name=REPORT, tags=tags).info
        try:
            for path in files:
                client.log_artifact(run.run_id, str(path))
        except Exception as error:  # the artifacts' folder of an experiment may be on another machine
            say(f"The report could not be written to {run.artifact_uri}: {_first_line(error)}. It is in {out}.")
            client.set_terminated(run.run_id, "FAILED")
        else:
            client.set_terminated(run.run_id)


@contextmanager
def _writing(uri: str, out: Path, consequence: str) -> Iterator[Any]:
    """Yield the client of a store to one process of a study at a time.

    SQLite is a single file, and two processes would create the experiment twice.
    """
    with folder_lock(out / LOCK):
        try:
            yield _client(uri)
        except InputError:
            raise
        except Exception as error:  # see `open_store`
            raise InputError(f"MLflow store {uri} cannot be written: {_first_line(error)}. {consequence}") from None


def _log(
    client: Any, experiment: str, name: str, done: Mapping[str, Any], *, outline: Mapping[str, Any], out: Path
) -> None:
    """Log a run, in place of an earlier one of its name."""
    from mlflow.entities import Metric, Param

    settings = done["settings"]
    facts = settings["facts"]
    params = {"kind": settings["kind"]}
    params |= {key: "" if value is None else str(value) for key, value in facts.items()}
    command = next(name for name in ("train", "propagate") if name in settings["commands"])
    options = settings["commands"][command]["options"]
    params |= {f"{command}.{key}": str(value)[:500] for key, value in options.items()}
    values = {"seconds": done["seconds"]}
    folder = out / "runs" / name
    if settings["kind"] == "pretraining":
        values |= {f"validation/{key}": value for key, value in figures_of_done(folder, done).items()}
    elif settings["kind"] == "propagation":
        dice = [row["dice"] for row in done["carried"] if row["dice"] is not None]
        values |= {"mean_dice_of_carried_labels": sum(dice) / len(dice)} if dice else {}
    else:
        labels = [label for value, label in settings["row"]["labels"].items() if int(value)]
        table = table_of(done["scores"], cases=settings["cases"]["scored"], labels=labels, absent=outline["absent"])
        values |= {f"mean_{metric}": figure_of(table[metric][None]) for metric in METRICS}
    now = int(1000 * time.time())
    metrics = [Metric(key, value, now, 0) for key, value in values.items()]
    metrics += [Metric(f"train/{key}", value, now, step) for step, key, value in _curve(folder)]
    metrics = [metric for metric in metrics if math.isfinite(metric.value)]
    for old in _find(client, experiment, name):
        client.delete_run(old.info.run_id)
    tags = {RUN_TAG: name, DIGEST_TAG: _digest(done)}
    run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    client.log_batch(run, params=[Param(key, value) for key, value in list(params.items())[:100]])
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[start : start + BATCH])
    client.set_terminated(run)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _curve(folder: Path) -> list[tuple[int, str, float]]:
    """Return loss and learning rate over the steps, from the bundle's training log."""
    path = folder / "train" / "training_log.csv"
    if not path.is_file():
        return []
    return [(row["step"], key, row[key]) for row in read_log(path) for key in ("loss", "learning_rate")]


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _file_of(uri: str) -> Path | None:
    """Return the file or folder of a store on this machine; None for a server."""
    scheme, colon, rest = uri.partition(":")
    if not colon or len(scheme) == 1:  # a plain path, or one with a Windows drive
        return Path(uri)
    if scheme == "sqlite":
        return Path(rest.removeprefix("///").partition("?")[0])
    return Path(url2pathname(urlsplit(uri).path)) if scheme == "file" else None


def _first_line(error: Exception) -> str:
    """Return the first line of an error, without what its library appends."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _few_retries() -> Iterator[None]:
    """Retry less often. By default MLflow calls a server that does not answer for minutes."""
    before = os.environ.get(RETRIES)
    os.environ[RETRIES] = "2"
    try:
        yield
    finally:
        os.environ.pop(RETRIES)
        if before is not None:
            os.environ[RETRIES] = before


def _experiment(client: Any, study: str, out: Path, uri: str) -> str:
    """Return the id of the folder's own experiment. The experiment of another folder of the study is left alone."""
    own = _identity(out)
    found = next((each for each in _of_study(client, study) if each.tags.get(FOLDER_TAG) == own), None)
    if found is not None:
        return found.experiment_id
    name, tags = experiment_name(study), {STUDY_TAG: study, FOLDER_TAG: own}
    on_server = uri.startswith(("http:", "https:", "databricks"))
    artifacts = None if on_server else (out / ARTIFACTS).resolve().as_uri()
    taken = client.get_experiment_by_name(name)
    if taken is None:
        return client.create_experiment(name, artifact_location=artifacts, tags=tags)
    if FOLDER_TAG not in taken.tags and taken.lifecycle_stage == "active" and _is_inside(uri, out):
        for key, value in tags.items():  # made by an earlier version in the folder's own store
            client.set_experiment_tag(taken.experiment_id, key, value)
        return taken.experiment_id
    return client.create_experiment(f"{name}-{own}", artifact_location=artifacts, tags=tags)


def _identity(out: Path) -> str:
    """Return the identity of a study's folder, wherever it is moved. It is created under the lock of `_writing`."""
    path = out / IDENTITY
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text(encoding="utf-8").strip()


def _is_inside(uri: str, out: Path) -> bool:
    """Return whether a store is a file in the study's folder."""
    path = _file_of(uri)
    return path is not None and path.resolve().is_relative_to(out.resolve())


def _of_study(client: Any, study: str) -> list[Any]:
    """Return the experiments of a study, one for each folder."""
    found, token = [], None
    while True:
        page = client.search_experiments(page_token=token)
        found += page
        token = page.token
        if not token:
            return [each for each in found if each.tags.get(STUDY_TAG) == study]


def _find(client: Any, experiment: str, name: str) -> list[Any]:
    return client.search_runs([experiment], filter_string=f"tags.`{RUN_TAG}` = '{name}'")


def _all_runs(client: Any, experiment: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], max_results=500, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
