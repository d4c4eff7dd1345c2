# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every run of a study in MLflow, one experiment a study's folder, so that table and picture can be drawn from the store alone.

A fine-tuning's scores are metrics ``dice/03 larynx/0017 patient_a`` (metric, label, case), beside their means; the outline of the
study is the experiment's tags. A run that was carried out anew takes the place of the one before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from bundles.common.errors import InputError
from bundles.common.files import one_at_a_time, write_text
from bundles.common.training.log import read_log

from .paired_bootstrap import figure_of
from .records import METRICS, OUTLINE, Result, figures_of_done, leave_out_absent, read_done, read_outline, table_of

OUTLINE_TAG, RUN_TAG, DIGEST_TAG = "evidence.outline", "evidence.run", "evidence.digest"
CHUNK = 4000  # characters of a tag
BATCH = 900  # metrics of a request, of 1000 that MLflow takes
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FACTS_PARAM, SECONDS = "facts", "seconds"
LOCK, IDENTITY = ".tracking.lock", ".study_id"
STUDY_TAG, FOLDER_TAG = "evidence.study.study", "evidence.folder"
FIGURE = "validation/"  # of a pre-training


def tracking_store(out: Path) -> str:
    """The store of a study's folder, unless another is asked for."""
    return f"sqlite:///{(out / 'mlruns.db').as_posix()}"


def experiment_name(study: str) -> str:
    """Name of the experiment of a study; a further folder's of the same study has the folder's identity after it."""
    return f"evidence_{study}"


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
        with one_at_a_time(out / LOCK) if out else nullcontext(), _impatient():
            client = _client(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever a store of this kind raises: a refused connection, a file of something else
        raise InputError(f"MLflow's store {uri} cannot be opened: {_words(error)}. Check --tracking_uri.") from None
    return client


def log_run(name: str, done: Mapping[str, Any], *, outline: Mapping[str, Any], out: Path, uri: str) -> None:
    """Log a finished run: its facts, its options, its scores, and the curve of its training.

    Args:
        name: of the run.
        done: what `execution.carry_out` returns.
        outline: of the plan, where the folder does not say yet what its report is about.
        out: folder of the study.
        uri: MLflow's store.

    Raises:
        InputError: the store cannot be written.
    """
    with _writing(uri, out, f"{name} is not lost: the same command logs it without training it again.") as client:
        experiment = _experiment(client, _outline_of(out, outline), out, uri)
        _log(client, experiment, name, done, outline=outline, out=out)


def log_missing(out: Path, *, outline: Mapping[str, Any], uri: str, say: Callable[[str], None]) -> None:
    """Make the store equal to a study's folder: what its report is about, and finished runs that the store lacks or has otherwise.

    Such runs were finished with another store, or by an earlier version, or carried out anew in a folder that was taken away.

    Args:
        out: folder of the study.
        outline: as in `log_run`.
        uri: MLflow's store.
        say: gets a progress line where there is something to log.

    Raises:
        InputError: the store cannot be written.
    """
    with _writing(uri, out, "Nothing is lost: the same command logs what is missing.") as client:
        experiment = _experiment(client, _outline_of(out, outline), out, uri)
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
            say(f"logging {len(missing)} finished runs that {uri} lacks")
        for folder, done in missing.items():
            _log(client, experiment, folder.name, done, outline=outline, out=out)


@contextmanager
def _writing(uri: str, out: Path, comfort: str) -> Iterator[Any]:
    """The client of a store, for one process of a study at a time: SQLite is one file, and two would make the experiment twice."""
    with one_at_a_time(out / LOCK):
        try:
            yield _client(uri)
        except InputError:
            raise
        except Exception as error:  # see `open_store`
            raise InputError(f"MLflow's store {uri} could not be written: {_words(error)}. {comfort}") from None


def _log(
    client: Any, experiment: str, name: str, done: Mapping[str, Any], *, outline: Mapping[str, Any], out: Path
) -> None:
    """Log a run in place of what the experiment has under its name."""
    from mlflow.entities import Metric, Param

    settings = done["settings"]
    facts = settings["facts"]
    params = {"kind": settings["kind"], FACTS_PARAM: json.dumps(facts)}
    params |= {key: "" if value is None else str(value) for key, value in facts.items()}
    params |= {f"train.{key}": str(value)[:500] for key, value in settings["commands"]["train"]["options"].items()}
    values = {SECONDS: done["seconds"]}
    folder = out / "runs" / name
    if settings["kind"] == "pretraining":
        values |= {FIGURE + key: value for key, value in figures_of_done(folder, done).items()}
    else:
        cases = settings["cases"]["scored"]
        labels = [label for value, label in settings["row"]["labels"].items() if int(value)]
        table = table_of(done["scores"], cases=cases, labels=labels)
        for metric in METRICS:  # all of them: what the report leaves out, it leaves out when it reads
            values |= dict(_keys(metric, table[metric], cases, labels))
        leave_out_absent(table, cases=cases, labels=labels, absent=outline["absent"])
        values |= {f"mean_{metric}": figure_of(table[metric][None]) for metric in METRICS}
    now = int(1000 * time.time())
    metrics = [Metric(key, value, now, 0) for key, value in values.items()]
    metrics += [Metric(f"train/{key}", value, now, step) for step, key, value in _curve(folder)]
    metrics = [metric for metric in metrics if math.isfinite(metric.value)]
    for old in _find(client, experiment, name):
        client.delete_run(old.info.run_id)
    tags = {RUN_TAG: name, DIGEST_TAG: _digest(done)}
    opened = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    client.log_batch(opened, params=[Param(key, value) for key, value in list(params.items())[:100]])
    for start in range(0, len(metrics), BATCH):
        client.log_batch(opened, metrics=metrics[start : start + BATCH])
    client.set_terminated(opened)


def _digest(done: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(done, sort_keys=True).encode()).hexdigest()[:16]


def _outline_of(out: Path, planned: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the folder's report is about: another process may have begun since, by another edit of the study."""
    return read_outline(out) if (out / OUTLINE).is_file() else planned


def read_store(
    uri: str, *, study: str, experiment: str | None = None
) -> tuple[dict[str, Any], list[Result], dict[str, dict[str, float]]]:
    """The outline of a study, its finished fine-tunings, and the figures of its pre-trainings by name, from MLflow alone.

    Args:
        uri: MLflow's store.
        study: its name.
        experiment: name of the experiment, where folders of several studies of that name were logged.

    Raises:
        InputError: there is no such store, it has no such experiment, or several and none is named.
    """
    client = open_store(uri)
    found = _chosen(client, uri, study, experiment)
    outline = _outline_in(found)
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


def _chosen(client: Any, uri: str, study: str, experiment: str | None) -> Any:
    named = [each for each in _of_study(client, study) if f"{OUTLINE_TAG}.0" in each.tags]
    found = [each for each in named if experiment in (None, each.name)]
    if not found:
        names = ", ".join(sorted(each.name for each in client.search_experiments())) or "none"
        raise InputError(
            f"{uri} has no experiment {experiment or experiment_name(study)} of the study {study}. Its experiments: {names}."
        )
    if len(found) > 1:
        said = []
        for each in sorted(found, key=lambda each: each.name):
            outline = _outline_in(each)
            said.append(f"{each.name} ({len(outline['cases'])} scored patients, n = {outline['curve']['n']})")
        raise InputError(f"{uri} has {len(found)} studies {study}: {'; '.join(said)}. Say which by --experiment NAME.")
    return found[0]


def _outline_in(experiment: Any) -> dict[str, Any]:
    chunks: list[str] = []
    while f"{OUTLINE_TAG}.{len(chunks)}" in experiment.tags:
        chunks.append(experiment.tags[f"{OUTLINE_TAG}.{len(chunks)}"])
    return {"absent": {}, **json.loads("".join(chunks))}  # studies of earlier versions do not say it


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


def _experiment(client: Any, outline: Mapping[str, Any], out: Path, uri: str) -> str:
    """The id of the folder's own experiment, with its outline as tags; another folder's study of that name is left alone."""
    study, own = outline["study"], _identity(out)
    found = next((each for each in _of_study(client, study) if each.tags.get(FOLDER_TAG) == own), None)
    if found is None:
        name, tags = experiment_name(study), {STUDY_TAG: study, FOLDER_TAG: own}
        taken = client.get_experiment_by_name(name)
        if taken is None:
            found = client.get_experiment(client.create_experiment(name, tags=tags))
        elif FOLDER_TAG not in taken.tags and taken.lifecycle_stage == "active" and _lies_in(uri, out):
            for key, value in tags.items():  # of an earlier version, in the folder's own store
                client.set_experiment_tag(taken.experiment_id, key, value)
            found = taken
        else:
            found = client.get_experiment(client.create_experiment(f"{name}-{own}", tags=tags))
    experiment = found.experiment_id
    text = json.dumps(outline)
    tags = {f"{OUTLINE_TAG}.{i}": text[i * CHUNK : (i + 1) * CHUNK] for i in range(-(-len(text) // CHUNK))}
    old = found.tags
    for key, value in tags.items():
        if old.get(key) != value:
            client.set_experiment_tag(experiment, key, value)
    for key in set(old) - set(tags):
        if key.startswith(OUTLINE_TAG):
            client.delete_experiment_tag(experiment, key)
    return experiment


def _identity(out: Path) -> str:
    """What tells folders of one study apart, wherever they lie; made with the first run that is logged, under the lock of `_writing`."""
    path = out / IDENTITY
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text(encoding="utf-8").strip()


def _lies_in(uri: str, out: Path) -> bool:
    """Whether a store is a file of the study's folder."""
    path = _file_of(uri)
    return path is not None and path.resolve().is_relative_to(out.resolve())


def _of_study(client: Any, study: str) -> list[Any]:
    """Experiments of a study's name, one for each folder; one of an earlier version, that does not say whose it is, is among them."""
    found, token = [], None
    while True:
        page = client.search_experiments(page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return [each for each in found if each.tags.get(STUDY_TAG) == study or each.name == experiment_name(study)]


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
