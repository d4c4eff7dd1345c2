# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""MLflow has every finished run and the tables of the report; a store that cannot be used is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from bundles.common.files import write_text
from evidence.report import write_report
from evidence.results.mlflow_store import log_missing, log_report, open_store

from ..made_up_study import CONTENT, REPORT, finished, made_up_scores, parts, plan_of, planner, write_study


def client_of(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_of(uri, experiment="evidence_made_up"):
    """The runs of an experiment that are not deleted, by name."""
    client = client_of(uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    named = {run.info.run_name: run for run in runs}
    assert len(named) == len(runs)
    return named


def mean_dice(run, *, gain=0.05, labels=("liver", "left kidney")):
    """Mean over labels of the mean over cases, as in the report."""
    rows = [row for row in made_up_scores(run, gain=gain) if row["dice"] is not None]
    means = [[row["dice"] for row in rows if row["label"] == label] for label in labels]
    return sum(sum(values) / len(values) for values in means) / len(labels)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder and a store of the same small study; one run was logged twice, first with other scores."""
    out = tmp_path_factory.mktemp("study")
    plan = plan_of(planner(curve={**CONTENT["curve"], "seeds": [0, 1]}), ["curve", "ablation"])
    uri = f"sqlite:///{out / 'mlruns.db'}"
    write_study(out, plan, gain=0.05)
    last = out / "runs" / plan.runs[-1].name / "done.json"
    right = last.read_text()
    last.write_text(json.dumps(finished(plan.runs[-1], gain=0.4)))
    log_missing(out, outline=plan.outline, uri=uri, say=lambda _: None)
    last.write_text(right)
    log = out / "runs/finetune_pretrained_n4_seed1/train/training_log.csv"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("step,loss,loss_dice,learning_rate\n20.0,1.5,1.0,0.02\n40,1.25,0.5,0.01\n")  # of a resumed run
    for run in plan.runs[:-1]:  # logged once more, with the curve
        client_of(uri).delete_run(runs_of(uri)[run.name].info.run_id)
    log_missing(out, outline=plan.outline, uri=uri, say=lambda _: None)
    return out, uri, plan


def test_every_run_is_tracked_once_with_what_it_was_made_by(tracked):
    _, uri, plan = tracked
    runs = runs_of(uri)
    assert sorted(runs) == sorted(run.name for run in plan.runs)
    one = runs["finetune_pretrained_n4_seed1"]
    assert one.data.params["arm"] == "pretrained" and one.data.params["n"] == "4" and one.data.params["seed"] == "1"
    assert one.data.params["encoder"] == "pretrain_pretrained_seed1" and one.data.params["train.max_steps"] == "60"
    curves = {"train/loss": [(20, 1.5), (40, 1.25)], "train/learning_rate": [(20, 0.02), (40, 0.01)]}
    for key, points in curves.items():
        history = client_of(uri).get_metric_history(one.info.run_id, key)
        assert [(each.step, each.value) for each in history] == points


def test_metrics_are_the_mean_scores_and_the_validation_figures(tracked):
    _, uri, plan = tracked
    runs = runs_of(uri)
    for run in plan.runs:
        metrics = runs[run.name].data.metrics
        assert metrics["seconds"] == 60.0 + len(run.name)
        if run.kind == "finetuning":
            assert metrics["mean_dice"] == pytest.approx(mean_dice(run))
            assert {"mean_nsd", "mean_hd95"} < set(metrics)
    metrics = runs["pretrain_pretrained_seed1"].data.metrics
    assert metrics["validation/rotation_accuracy"] == 0.5 and metrics["validation/steps"] == 100


def test_mean_scores_ignore_labels_that_a_case_does_not_have(tmp_path):
    made = planner(curve={**CONTENT["curve"], "n": [2], "seeds": [0]}, ablation=None)
    made.absent = {f"val_{i:02d}": ["left kidney"] for i in range(20)}
    plan = plan_of(made, ["curve"])
    uri, run = f"sqlite:///{tmp_path / 'mlruns.db'}", plan.runs[0]
    write_text(tmp_path / "runs" / run.name / "done.json", json.dumps(finished(run)))
    log_missing(tmp_path, outline=plan.outline, uri=uri, say=lambda _: None)
    assert runs_of(uri)[run.name].data.metrics["mean_dice"] == pytest.approx(mean_dice(run, labels=["liver"]))


def artifacts(uri, folder, experiment="evidence_made_up"):
    """Name to content of the artifacts of the run ``report``."""
    run = runs_of(uri, experiment)["report"]
    client = client_of(uri)
    names = [each.path for each in client.list_artifacts(run.info.run_id)]
    folder.mkdir(exist_ok=True)
    return {name: Path(client.download_artifacts(run.info.run_id, name, str(folder))).read_bytes() for name in names}


def test_report_is_tracked_with_the_files_of_the_folder(tmp_path):
    out, uri, plan = tmp_path / "out", f"sqlite:///{tmp_path / 'mlruns.db'}", small()
    write_study(out, plan, gain=0.05)
    write_report(out)
    log_report(out, study="made_up", uri=uri, say=pytest.fail)
    names = {
        "outline.json",
        "power.md",
        *(name for name in REPORT if "curve" in name),
    }  # without an ablation and a search
    assert artifacts(uri, tmp_path / "a") == {name: (out / name).read_bytes() for name in names}
    first = runs_of(uri)["report"].info.run_id
    log_report(out, study="made_up", uri=uri, say=pytest.fail)
    assert runs_of(uri)["report"].info.run_id == first  # nothing has changed

    write_text(out / "curve.md", "other\n")
    (out / "curve.png").unlink()
    log_report(out, study="made_up", uri=uri, say=pytest.fail)
    latest = artifacts(uri, tmp_path / "b")
    assert latest["curve.md"] == b"other\n" and "curve.png" not in latest


def test_a_folder_for_artifacts_that_cannot_be_written_is_named_and_does_not_stop_the_study(tmp_path):
    """The experiment was made on a machine that has the study's folder at another place."""
    out, uri, plan = tmp_path / "out", f"sqlite:///{tmp_path / 'mlruns.db'}", small()
    write_study(out, plan, gain=0.05)
    write_report(out)
    (tmp_path / "file").touch()
    tags = {"evidence.study.study": "made_up", "evidence.folder": "0123"}
    write_text(out / ".study_id", "0123\n")
    client_of(uri).create_experiment(
        "evidence_made_up", artifact_location=(tmp_path / "file/mlartifacts").as_uri(), tags=tags
    )
    lines = []
    log_report(out, study="made_up", uri=uri, say=lines.append)
    assert len(lines) == 1 and f"{tmp_path}/file" in lines[0] and f"It is in {out}" in lines[0]
    assert runs_of(uri)["report"].info.status == "FAILED"


@pytest.mark.parametrize(
    "uri", ["sqlite:///{}/no/folder/mlruns.db", "sqlite:///{}/text.db", "http://127.0.0.1:9", "htp://x"]
)
def test_a_wrong_address_is_named_before_anything_runs(tmp_path, uri):
    (tmp_path / "text.db").write_text("this is no database" * 100)
    uri = uri.format(tmp_path)
    with pytest.raises(InputError, match=re.escape(uri)):
        open_store(uri, out=tmp_path)
    assert not (tmp_path / "no").exists()


def test_a_store_that_fails_later_loses_no_run(tmp_path, tracked):
    out, _, plan = tracked
    (tmp_path / "text.db").write_text("this is no database" * 100)
    with pytest.raises(InputError, match="text.db cannot be written.*repeat the command to log what is missing"):
        log_missing(out, outline=plan.outline, uri=f"sqlite:///{tmp_path / 'text.db'}", say=lambda _: None)


def small(**changes):
    """A curve of one n; the seeds are 0 and 1 unless changed."""
    return plan_of(
        planner(**{"curve": {**CONTENT["curve"], "n": [2], "seeds": [0, 1]}, "ablation": None} | changes), ["curve"]
    )


def test_another_store_gets_what_was_finished_before(tmp_path):
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path / 'new.db'}"
    plan = small()
    write_study(out, plan, gain=0.05)
    lines = []
    log_missing(out, outline=plan.outline, uri=uri, say=lines.append)
    assert lines == [f"logging {len(plan.runs)} finished runs that are missing in {uri}"]
    assert sorted(runs_of(uri)) == sorted(run.name for run in plan.runs)
    run = plan.runs[-1]  # repeated after its folder was removed
    write_text(out / "runs" / run.name / "done.json", json.dumps(finished(run, gain=0.4)))
    log_missing(out, outline=plan.outline, uri=uri, say=lines.append)
    assert lines[1] == f"logging 1 finished runs that are missing in {uri}"
    assert sorted(runs_of(uri)) == sorted(run.name for run in plan.runs)
    assert runs_of(uri)[run.name].data.metrics["mean_dice"] == pytest.approx(mean_dice(run, gain=0.4))
    log_missing(out, outline=plan.outline, uri=uri, say=pytest.fail)


def test_folders_of_one_study_keep_their_runs_apart_in_one_store(tmp_path):
    uri = f"sqlite:///{tmp_path / 'server.db'}"
    first, second = small(), planner(curve={**CONTENT["curve"], "n": [2], "seeds": [0]}, ablation=None)
    second.parts = parts(validation=5)  # other data
    plans = {"a": first, "b": plan_of(second, ["curve"])}
    for name, plan in plans.items():
        write_study(tmp_path / name, plan, gain=0.05 if name == "a" else -0.2)
        log_missing(tmp_path / name, outline=plan.outline, uri=uri, say=lambda _: None)
        write_report(tmp_path / name)
        log_report(tmp_path / name, study="made_up", uri=uri, say=pytest.fail)
    own = (tmp_path / "b/.study_id").read_text().strip()
    for name, experiment in {"a": "evidence_made_up", "b": f"evidence_made_up-{own}"}.items():
        assert sorted(runs_of(uri, experiment)) == sorted([*(run.name for run in plans[name].runs), "report"])
        found = artifacts(uri, tmp_path / f"from_{name}", experiment)
        assert found["curve.csv"] == (tmp_path / name / "curve.csv").read_bytes()
    (tmp_path / "b").rename(tmp_path / "c")  # the same study at another place
    log_missing(tmp_path / "c", outline=plans["b"].outline, uri=uri, say=pytest.fail)


@pytest.mark.parametrize("inside", [True, False])
def test_an_experiment_of_an_earlier_version_is_used_further_only_in_the_folders_own_store(tmp_path, inside):
    out, plan = tmp_path / "out", small()
    write_study(out, plan, gain=0.05)
    uri = f"sqlite:///{(out if inside else tmp_path) / 'mlruns.db'}"
    client = client_of(uri)
    old = client.create_experiment("evidence_made_up", tags={"evidence.outline.0": json.dumps(plan.outline)})
    run = client.create_run(old, run_name=plan.runs[0].name, tags={"evidence.run": plan.runs[0].name})
    client.set_terminated(run.info.run_id)
    log_missing(out, outline=plan.outline, uri=uri, say=lambda _: None)
    kept = [each.info.run_id for each in client.search_runs([old])]
    assert (run.info.run_id in kept) != inside and len(kept) == (len(plan.runs) if inside else 1)
    own = "" if inside else f"-{(out / '.study_id').read_text().strip()}"
    assert sorted(runs_of(uri, f"evidence_made_up{own}")) == sorted(run.name for run in plan.runs)
