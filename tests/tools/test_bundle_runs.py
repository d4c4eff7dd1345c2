# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A plan is written once, and refuses options that do not exist and settings other than those of finished runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from tools.bundle_runs import Command, Run, placed, read_json, read_plan, spent, words_of, write_plan


def run(name="finetune_a", **changes):
    options = {"task": Path("task.yaml"), "dataset_dir": Path("lists/few.json"), "max_steps": 5, "resume": True}
    options |= {"pretrained_encoder": Path("/elsewhere/encoder.pt"), "hu_window": None} | changes.pop("options", {})
    command = Command(
        name="train", bundle="swin_unetr_msd", configs=("configs/train.yaml",), options=options, result="train/m.pt"
    )
    entries = {"kind": "finetuning", "facts": {"n": 2}, "lists": {"few": {"training": []}}, "cases": {}, "row": {}}
    return Run(name=name, commands=(command,), **{**entries, **changes})


def write(out, *runs):
    write_plan(
        out,
        workflow="study",
        name="made_up",
        source="study.yaml",
        runs=[(each, 1.0) for each in runs],
        parts={"curve": []},
    )


def test_words_are_those_of_the_command_line_with_the_paths_of_this_machine():
    words = placed(words_of(run().commands[0]), out=Path("/o"), run="finetune_a")
    assert words[:7] == ["-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml"]
    options = dict(zip(words[7::2], words[8::2], strict=True))
    assert options["--task"] == "/o/task.yaml" and options["--dataset_dir"] == "/o/runs/finetune_a/lists/few.json"
    assert options["--pretrained_encoder"] == "/elsewhere/encoder.pt" and options["--hu_window"] == "$None"
    assert options["--resume"] == "true" and options["--max_steps"] == "5"


def test_a_plan_holds_words_settings_and_lists(tmp_path):
    write(tmp_path, run())
    plan = read_plan(tmp_path)
    assert plan["workflow"] == "study" and plan["parts"] == {"curve": []}
    (command,) = plan["runs"]["finetune_a"]["commands"]
    assert "{out}/task.yaml" in command["words"] and "{run}/lists/few.json" in command["words"]
    options = plan["runs"]["finetune_a"]["settings"]["commands"]["train"]["options"]
    assert options["pretrained_encoder"] == "encoder.pt"  # wherever it lies
    assert json.loads((tmp_path / "runs/finetune_a/lists/few.json").read_text()) == {"training": []}
    before = (tmp_path / "plan.json").stat().st_mtime_ns
    write(tmp_path, run())
    assert (tmp_path / "plan.json").stat().st_mtime_ns == before


def test_other_settings_than_those_of_a_run_are_refused_with_both_values(tmp_path):
    write(tmp_path, run())
    (tmp_path / "runs/finetune_a/settings.json").write_text(
        json.dumps({**run().settings, "precision": {"train": "bf16"}})
    )
    write(tmp_path, run())
    elsewhere = Path("/moved/encoder.pt")
    write(tmp_path, run(options={"pretrained_encoder": elsewhere}))
    with pytest.raises(InputError, match=r"finetune_a was made with other settings: .*max_steps was 5, now 6"):
        write(tmp_path, run(options={"max_steps": 6}))
    assert read_plan(tmp_path)["runs"]["finetune_a"]["settings"]["commands"]["train"]["options"]["max_steps"] == 5


def test_many_changes_are_counted(tmp_path):
    settings = run(facts={str(i): i for i in range(9)})
    write(tmp_path, settings)
    (tmp_path / "runs/finetune_a/settings.json").write_text(json.dumps(settings.settings))
    with pytest.raises(InputError, match="and 4 more"):
        write(tmp_path, run(facts={str(i): -1 for i in range(9)}))


@pytest.mark.parametrize(("wrong", "right"), [("learning_rat", "learning_rate"), ("max_step", "max_steps")])
def test_an_option_that_does_not_exist_is_refused_before_anything_is_written(tmp_path, wrong, right):
    with pytest.raises(
        InputError,
        match=f"study.yaml: {wrong}, which finetune_a would get, is not an option of configs/train.yaml .*mean {right}",
    ):
        write(tmp_path, run(options={wrong: 1}))
    assert not list(tmp_path.iterdir())


def test_a_component_is_not_an_option(tmp_path):
    with pytest.raises(InputError, match="optimizer, which .* is not an option"):
        write(tmp_path, run(options={"optimizer": 1}))


@pytest.mark.parametrize("text", [None, "{", ""])
def test_a_missing_or_damaged_plan_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        read_plan(tmp_path)


def test_a_torn_file_is_named_with_what_follows(tmp_path):
    (tmp_path / "x.json").write_text("")
    with pytest.raises(InputError, match=r"x\.json is not valid JSON .*0 bytes.*Remove it: it comes again"):
        read_json(tmp_path / "x.json", "it comes again")


def test_time_that_was_never_noted_is_none(tmp_path):
    assert spent(tmp_path) == 0.0
    (tmp_path / ".spent.json").write_text("12.5")
    assert spent(tmp_path) == 12.5


def test_runs_are_not_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        run().name = "other"
