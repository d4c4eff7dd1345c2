# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every run of a study in MLflow, one experiment a study, so that table and picture can be drawn from the store alone.

A fine-tuning's scores are metrics ``dice/03 larynx/0017 patient_a`` (metric, label, case), beside their means; the outline of the
study is the experiment's tags. A run that was carried out anew takes the place of the one before.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from bundles.common.input_error import InputError
from bundles.common.training_log import read_log

from .claim import one_at_a_time
from .paired_bootstrap import figure_of
from .plan import Run
from .records import METRICS, Result, figures_of_done, leave_out_absent, table_of

OUTLINE_TAG, RUN_TAG = "evidence.outline", "evidence.run"
CHUNK = 4000  # characters of a tag
BATCH = 900  # metrics of a request, of 1000 that MLflow takes
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FACTS_PARAM, SECONDS = "facts", "seconds"
FIGURE = "validation/"  # of a pre-training


def tracking_store(out: Path) -> str:
    """The store of a study's folder, unless another is asked for."""
    return f"sqlite:///{(out / 'mlruns.db').as_posix()}"


def experiment_name(outline: Mapping[str, Any]) -> str:
    """Name of the experiment of a study."""
    return f"evidence_{outline['study']}"


def open_store(uri: str, *, out: Path | None = None) -> Any:
    """The store's client, once it has answered.

    Args:
        uri: MLflow's store.
        out: folder of the study that is to be logged: a database that is not there is made. None: the store must be there.

    Raises:
        InputError: the store is not there or does not answer.
    """
    path = _file_of(uri)
    if path is not None and not (path if out is None else path.parent).exists():
        raise InputError(f"MLflow's store {uri} is not there: {path if out is None else path.parent} does not exist.")
    try:
        with one_at_a_time(out / ".tracking.lock") if out else nullcontext(), _impatient():
            client = _client(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever a store of this kind raises: a refused connection, a file of something else
        raise InputError(f"MLflow's store {uri} cannot be opened: {_words(error)}. Check --tracking_uri.") from None
    return client


def log_run(run: Run, done: Mapping[str, Any], *, outline: Mapping[str, Any], out: Path, uri: str) -> None:
    """Log a finished run: its facts, its options, its scores, and the curve of its training.

    Args:
        run: of the plan.
        done: what `execution.carry_out` returns.
        outline: of the plan.
        out: folder of the study.
        uri: MLflow's store.

    Raises:
        InputError: the store cannot be written.
    """
    from mlflow.entities import Metric, Param

    facts = run.facts
    params = {"kind": run.kind, FACTS_PARAM: json.dumps(facts)}
    params |= {key: "" if value is None else str(value) for key, value in facts.items()}
    params |= {f"train.{key}": str(value)[:500] for key, value in run.commands[0].options.items()}
    now = int(1000 * time.time())
    metrics = [Metric(SECONDS, done["seconds"], now, 0)]
    if run.kind == "pretraining":
        figures = figures_of_done(out / "runs" / run.name, done)
        metrics += [Metric(FIGURE + key, value, now, 0) for key, value in figures.items()]
    if run.kind == "finetuning":
        scored = {case: i for i, case in enumerate(run.cases["scored"])}
        table = table_of(done["scores"], cases=list(scored), labels=outline["labels"], absent=outline["absent"])
        for metric in METRICS:
            metrics.append(Metric(f"mean_{metric}", figure_of(table[metric][None]), now, 0))
            for key, value in _keys(metric, table[metric], list(scored), outline["labels"]):
                metrics.append(Metric(key, value, now, 0))
    metrics += [Metric(f"train/{key}", value, now, step) for step, key, value in _curve(out / "runs" / run.name)]
    metrics = [metric for metric in metrics if math.isfinite(metric.value)]
    try:
        with one_at_a_time(out / ".tracking.lock"):  # SQLite is one file, and two would make the experiment twice
            client = _client(uri)
            experiment = _experiment(client, outline)
            for old in _find(client, experiment, run.name):
                client.delete_run(old.info.run_id)
            tags = {RUN_TAG: run.name}
            opened = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            client.log_batch(opened, params=[Param(key, value) for key, value in list(params.items())[:100]])
            for start in range(0, len(metrics), BATCH):
                client.log_batch(opened, metrics=metrics[start : start + BATCH])
            client.set_terminated(opened)
    except Exception as error:  # see `open_store`
        raise InputError(
            f"MLflow's store {uri} could not be written: {_words(error)}. {run.name} is not lost: the same command logs it without training it again."
        ) from None


def read_store(uri: str, *, study: str) -> tuple[dict[str, Any], list[Result], dict[str, dict[str, float]]]:
    """The outline of a study, its finished fine-tunings, and the figures of its pre-trainings by name, from MLflow alone.

    Args:
        uri: MLflow's store.
        study: its name.

    Raises:
        InputError: there is no such store, or it has no such experiment.
    """
    client = open_store(uri)
    found = client.get_experiment_by_name(experiment_name({"study": study}))
    if found is None or f"{OUTLINE_TAG}.0" not in found.tags:
        names = ", ".join(sorted(each.name for each in client.search_experiments())) or "none"
        raise InputError(f"{uri} has no experiment {experiment_name({'study': study})}. Its experiments: {names}.")
    chunks = []
    while f"{OUTLINE_TAG}.{len(chunks)}" in found.tags:
        chunks.append(found.tags[f"{OUTLINE_TAG}.{len(chunks)}"])
    outline = {"absent": {}, **json.loads("".join(chunks))}  # studies of earlier versions do not say it
    newest: dict[str, Any] = {}
    for run in _all_runs(client, found.experiment_id):
        name = run.data.tags.get(RUN_TAG, "")
        if name.startswith(("finetune_", "pretrain_")) and run.info.status == "FINISHED":
            if name not in newest or run.info.start_time > newest[name].info.start_time:
                newest[name] = run
    results, figures = [], {}
    for name, run in sorted(newest.items()):
        if name.startswith("pretrain_"):
            found_here = {key: value for key, value in run.data.metrics.items() if key.startswith(FIGURE)}
            figures[name] = {key.removeprefix(FIGURE): value for key, value in found_here.items()}
            continue
        scores = {}
        for metric in METRICS:
            scores[metric] = np.full((len(outline["cases"]), len(outline["labels"])), math.nan)
            for place, key in _places(metric, outline["cases"], outline["labels"]):
                if key in run.data.metrics:
                    scores[metric][place] = run.data.metrics[key]
        leave_out_absent(scores, cases=outline["cases"], labels=outline["labels"], absent=outline["absent"])
        facts = json.loads(run.data.params[FACTS_PARAM])
        results.append(Result(name, facts, scores, run.data.metrics[SECONDS]))
    return outline, results, figures


def _places(metric: str, cases: list[str], labels: list[str]) -> Iterator[tuple[tuple[int, int], str]]:
    """Place in the table, and name of the metric; MLflow takes few characters in names, so numbers tell names apart."""
    for row, case in enumerate(cases):
        for column, label in enumerate(labels):
            key = f"{metric}/{column + 1:02d} {label}/{row + 1:04d} {case}"
            yield (row, column), re.sub(r"[^A-Za-z0-9_.\-/ ]", "_", key)


def _keys(metric: str, table: np.ndarray, cases: list[str], labels: list[str]) -> Iterator[tuple[str, float]]:
    for place, key in _places(metric, cases, labels):
        if not math.isnan(table[place]):
            yield key, float(table[place])


def _curve(folder: Path) -> list[tuple[int, str, float]]:
    """Loss and learning rate over the steps, as the bundle logged them."""
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
    """File or folder of a store on this machine, None for a server."""
    scheme, colon, rest = uri.partition(":")
    if not colon or len(scheme) == 1:  # a plain path, maybe of Windows
        return Path(uri)
    if scheme == "sqlite":
        return Path(rest.removeprefix("///").partition("?")[0])
    return Path(url2pathname(urlsplit(uri).path)) if scheme == "file" else None


def _words(error: Exception) -> str:
    """The first line of an error, without what its library adds."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _impatient() -> Iterator[None]:
    """MLflow asks a server that does not answer for minutes; a first look need not."""
    before = os.environ.get(RETRIES)
    os.environ[RETRIES] = "2"
    try:
        yield
    finally:
        os.environ.pop(RETRIES)
        if before is not None:
            os.environ[RETRIES] = before


def _experiment(client: Any, outline: Mapping[str, Any]) -> str:
    name = experiment_name(outline)
    found = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name) if found is None else found.experiment_id
    text = json.dumps(outline)
    tags = {f"{OUTLINE_TAG}.{i}": text[i * CHUNK : (i + 1) * CHUNK] for i in range(-(-len(text) // CHUNK))}
    old = {} if found is None else found.tags
    for key, value in tags.items():
        if old.get(key) != value:
            client.set_experiment_tag(experiment, key, value)
    for key in set(old) - set(tags):
        if key.startswith(OUTLINE_TAG):
            client.delete_experiment_tag(experiment, key)
    return experiment


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
