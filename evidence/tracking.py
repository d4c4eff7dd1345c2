# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every run of a study in MLflow, one experiment a study, so that table and picture can be drawn from the store alone.

A fine-tuning's scores are metrics ``dice/03 larynx/0017 patient_a`` (metric, label, case), beside their means; the outline of the
study is the experiment's tags. A run that was carried out anew takes the place of the one before.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.input_error import InputError

from .claim import one_at_a_time
from .paired_bootstrap import figure_of
from .plan import Run
from .records import METRICS, Result, table_of

OUTLINE_TAG, RUN_TAG = "evidence.outline", "evidence.run"
CHUNK = 4000  # characters of a tag
BATCH = 900  # metrics of a request, of 1000 that MLflow takes
FACTS_PARAM, SECONDS = "facts", "seconds"


def tracking_store(out: Path) -> str:
    """The store of a study's folder, unless another is asked for."""
    return f"sqlite:///{(out / 'mlruns.db').as_posix()}"


def experiment_name(outline: Mapping[str, Any]) -> str:
    """Name of the experiment of a study."""
    return f"evidence_{outline['study']}"


def log_run(run: Run, done: Mapping[str, Any], *, outline: Mapping[str, Any], out: Path, uri: str) -> None:
    """Log a finished run: its facts, its options, its scores, and the curve of its training.

    Args:
        run: of the plan.
        done: what `execution.carry_out` returns.
        outline: of the plan.
        out: folder of the study.
        uri: MLflow's store.
    """
    from mlflow.entities import Metric, Param

    facts = run.facts
    params = {"kind": run.kind, FACTS_PARAM: json.dumps(facts)}
    params |= {key: "" if value is None else str(value) for key, value in facts.items()}
    params |= {f"train.{key}": str(value)[:500] for key, value in run.commands[0].options.items()}
    now = int(1000 * time.time())
    metrics = [Metric(SECONDS, done["seconds"], now, 0)]
    if run.kind == "finetuning":
        scored = {case: i for i, case in enumerate(run.cases["scored"])}
        table = table_of(done["scores"], cases=list(scored), labels=outline["labels"])
        for metric in METRICS:
            metrics.append(Metric(f"mean_{metric}", figure_of(table[metric][None]), now, 0))
            for key, value in _keys(metric, table[metric], list(scored), outline["labels"]):
                metrics.append(Metric(key, value, now, 0))
    metrics += [Metric(f"train/{key}", value, now, step) for step, key, value in _curve(out / "runs" / run.name)]
    metrics = [metric for metric in metrics if math.isfinite(metric.value)]
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


def read_store(uri: str, *, study: str) -> tuple[dict[str, Any], list[Result]]:
    """The outline of a study and its finished fine-tunings, from MLflow alone.

    Args:
        uri: MLflow's store.
        study: its name.

    Raises:
        InputError: the store has no such experiment.
    """
    client = _client(uri)
    found = client.get_experiment_by_name(experiment_name({"study": study}))
    if found is None or f"{OUTLINE_TAG}.0" not in found.tags:
        names = ", ".join(sorted(each.name for each in client.search_experiments())) or "none"
        raise InputError(f"{uri} has no experiment {experiment_name({'study': study})}. Its experiments: {names}.")
    chunks = []
    while f"{OUTLINE_TAG}.{len(chunks)}" in found.tags:
        chunks.append(found.tags[f"{OUTLINE_TAG}.{len(chunks)}"])
    outline = json.loads("".join(chunks))
    newest: dict[str, Any] = {}
    for run in _all_runs(client, found.experiment_id):
        name = run.data.tags.get(RUN_TAG, "")
        if name.startswith("finetune_") and run.info.status == "FINISHED":
            if name not in newest or run.info.start_time > newest[name].info.start_time:
                newest[name] = run
    results = []
    for name, run in sorted(newest.items()):
        scores = {}
        for metric in METRICS:
            scores[metric] = np.full((len(outline["cases"]), len(outline["labels"])), math.nan)
            for place, key in _places(metric, outline["cases"], outline["labels"]):
                if key in run.data.metrics:
                    scores[metric][place] = run.data.metrics[key]
        facts = json.loads(run.data.params[FACTS_PARAM])
        results.append(Result(name, facts, scores, run.data.metrics[SECONDS]))
    return outline, results


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
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("step")]
    return [(int(row["step"]), key, float(row[key])) for row in rows for key in ("loss", "lr") if row.get(key)]


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


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
