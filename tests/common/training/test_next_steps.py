# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The end of a run says whether more steps would help, and what to type next; only what its figures and files bear."""

from __future__ import annotations

import shlex
import sys

import pytest
from ignite.engine import Engine
from monai.handlers import MLFlowHandler

from bundles.common.run.mlflow_server import tolerate_lost_servers
from bundles.common.training.next_steps import NextSteps, scans_to_segment, still_improves

RISING = [[10, 0.2], [20, 0.4], [30, 0.5], [40, 0.6]]


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (RISING, ([30, 0.5], [40, 0.6])),
        ([*RISING, [50, 0.59]], None),  # the last of five is the end, and it is no better
        ([[10, 0.6], [20, 0.5], [30, 0.4], [40, 0.602]], None),  # better by less than noise
        ([[10, 0.6], [20, 0.5], [30, 0.4], [40, 0.61]], ([10, 0.6], [40, 0.61])),
        (RISING[1:], None),  # too few to tell
        ([[step, 0.1] for step in range(1, 9)], None),
        ([[step, 0.0] for step in range(1, 9)], None),
        (
            [*([step, 0.1] for step in range(1, 7)), [7, 0.3], [8, 0.2]],
            ([1, 0.1], [7, 0.3]),
        ),  # two of eight are the end
        ([], None),
    ],
)
def test_a_score_still_improves_if_the_end_is_better_by_more_than_noise(scores, found):
    assert still_improves(scores, higher_is_better=True) == found
    falling = [[step, -score] for step, score in scores]
    mirrored = found and tuple([step, -score] for step, score in found)
    assert still_improves(falling, higher_is_better=False) == mirrored


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """A ``monai.bundle run`` command in a folder of bundles."""
    for bundle in ("this", "other"):
        (tmp_path / bundle / "configs").mkdir(parents=True)
        (tmp_path / bundle / "configs" / "train.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "this")

    def type_words(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["/x/monai/bundle/__main__.py", "run", *words])

    type_words("--config_file", "configs/train.yaml")
    return type_words


def messages(caplog, *, scores=(), uri=None, steps=40, **options) -> list[str]:
    trainer = Engine(lambda engine, batch: None)
    trainer.accumulation_steps = 1
    trainer.state.validations = [list(point) for point in scores]
    NextSteps(**{"score": "mean_dice", "commands": {}} | options).attach(trainer)
    if uri:
        handler = MLFlowHandler(tracking_uri=uri, experiment_name="e", iteration_log=False, close_on_complete=True)
        tolerate_lost_servers([handler])[0].attach(trainer)
    with caplog.at_level("INFO", logger="bundles"):
        trainer.run(range(steps))
    return [record.getMessage() for record in caplog.records if record.name.startswith("bundles")]


def test_a_score_that_rises_comes_with_the_options_that_go_on(caplog):
    (line,) = messages(caplog, scores=RISING)
    assert line.startswith("mean_dice still improves: 0.5000 at step 30, 0.6000 at step 40 of 40. ")
    assert line.endswith("""--max_steps 80 --resume true --resume_changes "['max_steps']\"""")


def test_a_score_that_has_settled_is_told_without_an_advice_to_go_on(caplog):
    (line,) = messages(caplog, scores=[*RISING[:3], [40, 0.501]])
    assert line == "mean_dice hardly improves any more: best 0.5010 at step 40 in 4 validations"


def test_of_few_validations_nothing_is_said(caplog):
    assert messages(caplog, scores=RISING[1:]) == []


def test_a_command_has_the_config_beside_the_typed_one_and_quotes_its_values(typed, caplog):
    options = {"dataset_dir": "my data", "data_list": None, "pretrained_model": "out/model.pt"}
    (line,) = messages(caplog, commands={"scores": {"config": "evaluate.yaml", "options": options}})
    head, command = line.split("\n")
    assert head == "next, scores:" and shlex.split(command) == [
        *("python", "-m", "monai.bundle", "run", "--config_file", "configs/evaluate.yaml"),
        *("--dataset_dir", "my data", "--pretrained_model", "out/model.pt"),
    ]


def test_the_typed_bundle_root_and_the_first_of_several_configs_count(typed, caplog):
    typed("--config_file", "['b/configs/train.yaml','b/configs/multi_gpu_train.yaml']", "--bundle_root=b")
    (line,) = messages(caplog, commands={"scores": {"config": "evaluate.yaml", "options": {}}})
    assert line.endswith("run --config_file b/configs/evaluate.yaml --bundle_root b")


def test_another_bundle_is_named_by_its_folder_beside_this_one(typed, caplog):
    command = {"config": "train.yaml", "bundle": "other", "options": {"task": "DATA"}}
    (line,) = messages(caplog, commands={"fine-tuning": command})
    assert line.endswith("--config_file ../other/configs/train.yaml --bundle_root ../other --task DATA")


@pytest.mark.parametrize(
    "command",
    [{"bundle": "absent"}, {"useful": False}, {"needs": "models/network.pt"}],
    ids=lambda one: next(iter(one)),
)
def test_a_command_that_would_not_work_is_not_told(typed, caplog, command):
    assert messages(caplog, commands={"next": {"config": "train.yaml", "options": {}} | command}) == []


def test_outside_of_monai_bundle_run_there_is_no_command(monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["/x/monailabel", "start_server"])
    assert messages(caplog, commands={"scores": {"config": "evaluate.yaml", "options": {}}}) == []


def test_a_tracked_run_tells_its_address_and_the_next_command_writes_into_the_same_store(typed, caplog, tmp_path):
    uri = f"sqlite:///{tmp_path}/my runs.db"
    typed("--config_file", "configs/train.yaml", "--tracking", "mlflow")
    told = {"config": "evaluate.yaml", "options": {}}
    shown, tracked, other = messages(caplog, uri=uri, commands={"a": told, "b": told}, tracked=["a"])
    assert f"mlflow ui --backend-store-uri '{uri}', then http://127.0.0.1:5000" in shown
    assert tracked.endswith(f"evaluate.yaml --tracking mlflow --tracking_uri '{uri}'")
    assert other.endswith("evaluate.yaml")


def test_only_rank_0_tells(monkeypatch, typed, caplog):
    monkeypatch.setattr("bundles.common.training.next_steps.rank", lambda: 1)
    assert messages(caplog, scores=RISING, commands={"a": {"config": "evaluate.yaml", "options": {}}}) == []


def test_unlabelled_scans_of_the_data_set_are_those_to_segment(tmp_path):
    assert scans_to_segment(dataset_dir=str(tmp_path)) == "SCAN.nii.gz"
    (tmp_path / "imagesTs").mkdir()
    assert scans_to_segment(dataset_dir=str(tmp_path)) == "SCAN.nii.gz"
    (tmp_path / "imagesTs" / "a.nii.gz").write_text("")
    assert scans_to_segment(dataset_dir=str(tmp_path)) == str(tmp_path / "imagesTs")
