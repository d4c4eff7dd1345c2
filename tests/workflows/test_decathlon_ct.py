# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Miniature CT tasks of the Decathlon through the command line: train, evaluate, submit, build the results table."""

from __future__ import annotations

import pytest

from .command_line import run_bundle, succeed
from .decathlon_runs import CT, MR, TaskRun, check_evaluation, check_model, check_submission, read_csv, submit


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, TaskRun]:
    folder = tmp_path_factory.mktemp("ct")
    return {task: TaskRun(folder, task) for task in CT}


@pytest.fixture(scope="module")
def archive(runs):
    return submit(runs)


def test_these_and_the_mr_tasks_are_ten():
    assert (len(CT), len(MR), len({*CT, *MR})) == (6, 4, 10)


@pytest.mark.parametrize("task", CT)
def test_a_task_trains(runs, task):
    check_model(runs[task])


@pytest.mark.parametrize("task", CT)
def test_a_task_is_evaluated(runs, task):
    check_evaluation(runs[task])


@pytest.mark.parametrize("task", CT)
def test_a_task_is_submitted(runs, task, archive):
    check_submission(runs[task], archive)


def test_the_table_has_the_scores_of_these_tasks_and_leaves_the_others_empty(runs, tmp_path):
    evaluations = [str(run.evaluation) for run in runs.values()]
    succeed(run_bundle("swin_unetr_msd", "results.yaml", evaluations=evaluations, output_dir=tmp_path))
    table = {(row["task"], row["label"]): row for row in read_csv(tmp_path / "results.csv")}
    for run in runs.values():
        for scored in run.scores():
            row = table[run.task, scored["label"]]
            assert (row["scratch_dice"], row["scratch_nsd"]) == (scored["dice"], scored["nsd"])
            assert row["pretrained_dice"] == ""
        mean = sum(float(scored["dice"]) for scored in run.scores()) / len(run.organs)
        assert float(table[run.task, "mean"]["scratch_dice"]) == pytest.approx(mean, abs=1e-6)
    empty = {task for task, _ in table if table[task, "mean"]["scratch_dice"] == ""}
    assert empty == set(MR)
