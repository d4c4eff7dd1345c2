# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Table and picture from MLflow alone are those from the folder, to the byte."""

from __future__ import annotations

import pytest

from bundles.common.input_error import InputError
from evidence.report import main, write_report
from evidence.run import plan_of
from evidence.tracking import log_run, read_store

from .made_up_study import CONTENT, finished, planner, write_study


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder and a store of the same small study; one run was logged twice, first with other scores."""
    out = tmp_path_factory.mktemp("study")
    plan = plan_of(planner(curve={**CONTENT["curve"], "seeds": [0, 1]}, ablation=None), ["curve"])
    uri = f"sqlite:///{out / 'mlruns.db'}"
    write_study(out, plan, gain=0.05)
    write_report(out)
    log_run(plan.runs[-1], finished(plan.runs[-1], gain=0.4), outline=plan.outline, out=out, uri=uri)
    for run in plan.runs:
        log_run(run, finished(run), outline=plan.outline, out=out, uri=uri)
    return out, uri, plan


def test_report_from_the_store_equals_that_from_the_folder(tracked, tmp_path, capsys):
    out, uri, _ = tracked
    assert main([str(tmp_path), "--tracking_uri", uri, "--study", "made_up"]) == 0
    for name in ("curve.csv", "curve.md", "curve.png"):
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


def test_an_unknown_study_names_the_experiments(tracked):
    with pytest.raises(InputError, match="evidence_other.*evidence_made_up"):
        read_store(tracked[1], study="other")
