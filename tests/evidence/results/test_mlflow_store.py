# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Tables and pictures from MLflow alone are those from the folder, to the byte."""

from __future__ import annotations

import json
import re

import pytest

from bundles.common.errors import InputError
from bundles.common.files import write_text
from evidence.report import draw, main, write_report
from evidence.results.mlflow_store import log_missing, log_run, open_store, read_store
from evidence.run import plan_of

from ..made_up_study import CONTENT, REPORT, finished, one_sided, parts, planner, write_study


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder and a store of the same small study; one run was logged twice, first with other scores."""
    out = tmp_path_factory.mktemp("study")
    plan = plan_of(planner(curve={**CONTENT["curve"], "seeds": [0, 1]}), ["curve", "ablation"])
    uri = f"sqlite:///{out / 'mlruns.db'}"
    write_study(out, plan, gain=0.05)
    write_report(out)
    log_run(plan.runs[-1].name, finished(plan.runs[-1], gain=0.4), outline=plan.outline, out=out, uri=uri)
    log = out / "runs/finetune_pretrained_n4_seed1/train/training_log.csv"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("step,loss,loss_dice,learning_rate\n20.0,1.5,1.0,0.02\n40,1.25,0.5,0.01\n")  # of a resumed run
    for run in plan.runs:
        log_run(run.name, finished(run), outline=plan.outline, out=out, uri=uri)
    return out, uri, plan


def test_report_from_the_store_equals_that_from_the_folder(tracked, tmp_path, capsys):
    out, uri, _ = tracked
    assert main([str(tmp_path), "--tracking_uri", uri, "--study", "made_up"]) == 0
    for name in REPORT:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert "pre-training gains" in capsys.readouterr().out


def test_one_experiment_holds_each_run_once_with_its_facts(tracked):
    from mlflow.tracking import MlflowClient

    _, uri, plan = tracked
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("evidence_made_up")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(run.name for run in plan.runs)
    one = next(run for run in runs if run.info.run_name == "finetune_pretrained_n4_seed1")
    assert one.data.params["arm"] == "pretrained" and one.data.params["n"] == "4" and one.data.params["seed"] == "1"
    assert one.data.params["encoder"] == "pretrain_pretrained_seed1"
    assert "mean_dice" in one.data.metrics and "dice/01 liver/0001 val_00" in one.data.metrics
    curves = {"train/loss": [(20, 1.5), (40, 1.25)], "train/learning_rate": [(20, 0.02), (40, 0.01)]}
    for key, points in curves.items():
        assert [(each.step, each.value) for each in client.get_metric_history(one.info.run_id, key)] == points


def test_an_unknown_study_names_the_experiments(tracked):
    with pytest.raises(InputError, match="evidence_other.*evidence_made_up"):
        read_store(tracked[1], study="other")


def test_one_sided_scores_are_left_out_of_the_store_too(tmp_path):
    made = planner(curve={**CONTENT["curve"], "n": [2], "seeds": [0, 1]}, ablation=None)
    made.absent = {"val_03": ["left kidney"]}
    plan = plan_of(made, ["curve"])
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path / 'mlruns.db'}"
    write_study(out, plan, gain=0.05)
    done = one_sided(out, plan)
    write_report(out)
    for run in plan.runs:
        log_run(run.name, done[run.name], outline=plan.outline, out=out, uri=uri)
    assert main([str(tmp_path / "again"), "--tracking_uri", uri, "--study", "made_up"]) == 0
    for name in ("curve.csv", "curve.md", "curve.png"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_a_report_from_a_store_that_is_not_there_makes_none(tmp_path, capsys):
    for uri in (f"sqlite:///{tmp_path / 'missing.db'}", str(tmp_path / "missing"), f"file://{tmp_path / 'missing'}"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "report"), "--tracking_uri", uri, "--study", "made_up"])
        assert re.search("Stopped: .*missing.* is not there", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


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
    _, _, plan = tracked
    (tmp_path / "text.db").write_text("this is no database" * 100)
    with pytest.raises(InputError, match="text.db could not be written.*the same command logs it"):
        run = plan.runs[0]
        log_run(run.name, finished(run), outline=plan.outline, out=tmp_path, uri=f"sqlite:///{tmp_path / 'text.db'}")


def small(**changes):
    """A curve of one n; the seeds are 0 and 1 unless changed."""
    return plan_of(
        planner(**{"curve": {**CONTENT["curve"], "n": [2], "seeds": [0, 1]}, "ablation": None} | changes), ["curve"]
    )


def same_from_the_store(out, uri, folder, **options):
    """Whether the report from MLflow alone has the bytes of that from the folder."""
    write_report(out)
    draw(*read_store(uri, study="made_up", **options), folder)
    return all((folder / name).read_bytes() == (out / name).read_bytes() for name in REPORT if "curve" in name)


def test_a_store_follows_the_folder_through_changes_of_the_study(tmp_path):
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path / 'mlruns.db'}"
    plan = small()
    write_study(out, plan, gain=0.05)
    for run in plan.runs:
        log_run(run.name, finished(run), outline=plan.outline, out=out, uri=uri)
    assert same_from_the_store(out, uri, tmp_path / "again")
    made = planner(curve={**CONTENT["curve"], "n": [2], "seeds": [0]}, ablation=None)
    made.absent = {"val_01": ["liver"]}
    changed = made.outline()
    write_text(out / "outline.json", json.dumps(changed))
    log_missing(out, outline=changed, uri=uri, say=pytest.fail)  # no run is logged anew
    assert same_from_the_store(out, uri, tmp_path / "again")
    assert "1 of 1" in (out / "curve.md").read_text()
    # a process of the study as it was logs its run: the report stays the folder's
    log_run(plan.runs[0].name, finished(plan.runs[0]), outline=plan.outline, out=out, uri=uri)
    assert same_from_the_store(out, uri, tmp_path / "again")


def test_another_store_gets_what_was_finished_before(tmp_path):
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path / 'new.db'}"
    plan = small()
    write_study(out, plan, gain=0.05)
    said = []
    log_missing(out, outline=plan.outline, uri=uri, say=said.append)
    assert said == [f"logging {len(plan.runs)} finished runs that {uri} lacks"]
    assert same_from_the_store(out, uri, tmp_path / "again")
    one = finished(plan.runs[-1], gain=0.4)  # carried out anew in a folder that was taken away
    write_text(out / "runs" / plan.runs[-1].name / "done.json", json.dumps(one))
    log_missing(out, outline=plan.outline, uri=uri, say=said.append)
    assert said[1] == f"logging 1 finished runs that {uri} lacks"
    assert same_from_the_store(out, uri, tmp_path / "again")
    log_missing(out, outline=plan.outline, uri=uri, say=pytest.fail)


def test_folders_of_one_study_keep_their_runs_apart_in_one_store(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path / 'server.db'}"
    first, second = small(), planner(curve={**CONTENT["curve"], "n": [2], "seeds": [0]}, ablation=None)
    second.parts = parts(validation=5)  # other data
    plans = {"a": first, "b": plan_of(second, ["curve"])}
    for name, plan in plans.items():
        write_study(tmp_path / name, plan, gain=0.05 if name == "a" else -0.2)
        for run in plan.runs:
            done = json.loads((tmp_path / name / "runs" / run.name / "done.json").read_text())
            log_run(run.name, done, outline=plan.outline, out=tmp_path / name, uri=uri)
    own = (tmp_path / "b/.study_id").read_text().strip()
    names = {"a": "evidence_made_up", "b": f"evidence_made_up-{own}"}
    for name, experiment in names.items():
        assert same_from_the_store(tmp_path / name, uri, tmp_path / "again", experiment=experiment)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "report"), "--tracking_uri", uri, "--study", "made_up"])
    error = capsys.readouterr().err
    for name, patients in (("a", 20), ("b", 5)):
        assert f"{names[name]} ({patients} scored patients, n = [2])" in error
    assert "has 2 studies made_up" in error and "--experiment NAME" in error
    words = [str(tmp_path / "report"), "--tracking_uri", uri, "--study", "made_up", "--experiment", names["b"]]
    assert main(words) == 0
    (tmp_path / "b").rename(tmp_path / "c")  # the same study at another place
    log_missing(tmp_path / "c", outline=plans["b"].outline, uri=uri, say=pytest.fail)


@pytest.mark.parametrize("inside", [True, False])
def test_an_experiment_of_an_earlier_version_is_taken_on_in_the_folders_own_store_alone(tmp_path, inside):
    from mlflow.tracking import MlflowClient

    out, plan = tmp_path / "out", small()
    write_study(out, plan, gain=0.05)
    uri = f"sqlite:///{(out if inside else tmp_path) / 'mlruns.db'}"
    client = MlflowClient(tracking_uri=uri)
    tags = {"evidence.outline.0": json.dumps({key: value for key, value in plan.outline.items() if key != "absent"})}
    old = client.create_experiment("evidence_made_up", tags=tags)
    run = client.create_run(old, run_name=plan.runs[0].name, tags={"evidence.run": plan.runs[0].name})
    client.set_terminated(run.info.run_id)
    log_missing(out, outline=plan.outline, uri=uri, say=lambda _: None)
    kept = [each.info.run_id for each in client.search_runs([old])]
    assert (run.info.run_id in kept) != inside and len(kept) == (len(plan.runs) if inside else 1)
    other = {} if inside else {"experiment": f"evidence_made_up-{(out / '.study_id').read_text().strip()}"}
    assert same_from_the_store(out, uri, tmp_path / "again", **other)
