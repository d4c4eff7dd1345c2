# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compared runs have the same precision: a process on another kind of GPU is refused with both precisions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from bundles.common.errors import InputError
from bundles.common.files import write_text
from evidence.runs.execution import check_settings
from evidence.runs.plan import precision_of
from evidence.study.study import BUNDLES, OF_THE_PLAN, PRETRAIN, SEGMENT

from ..made_up_study import planner

FIXED = {"amp": False}


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on a machine without a GPU, or with an older or newer one."""

    def go(kind):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind != "cpu")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: kind == "new")

    return go


def runs_here(**changes):
    return {run.name: run for run in planner(**changes).curve()}


def begin(out, run, **changes):
    write_text(out / "runs" / run.name / "settings.json", json.dumps({**run.settings, **changes}))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("cpu", {}, "fp32"),
        ("old", {}, "fp16"),
        ("new", {}, "bf16"),
        ("new", {"amp_type": "fp16"}, "fp16"),
        ("cpu", {"amp_type": "bf16"}, "fp32"),
        ("new", {"amp": False}, "fp32"),
        ("cpu", {"amp": True, "amp_type": "bf16"}, "bf16"),
    ],
)
def test_precision_is_that_of_the_bundles_on_this_machine(machine, kind, options, expected):
    machine(kind)
    assert precision_of(options) == expected


@pytest.mark.parametrize("config", [(PRETRAIN, "train"), (SEGMENT, "train"), (SEGMENT, "evaluate")])
def test_defaults_are_those_of_the_bundles(config):
    bundle, name = config
    values = yaml.safe_load((BUNDLES / bundle / f"configs/{name}.yaml").read_text())
    # On a GPU, if there is one: a study cannot set the device.
    default = {"_target_": "scripts.common.run.mixed_precision.is_gpu", "device": "@device"}
    assert (values["amp"], values["amp_type"]) == (default, "auto")
    assert "device" in OF_THE_PLAN and values["device"]["_target_"].endswith("local_device")


@pytest.mark.parametrize("name", ["finetune_scratch_n2_seed0", "pretrain_pretrained_seed0"])
def test_a_run_of_another_kind_of_gpu_is_refused_with_both_precisions_and_what_to_do(machine, tmp_path, name):
    machine("new")
    begin(tmp_path, runs_here()[name])
    check_settings(runs_here()[name], tmp_path)
    machine("old")
    words = (
        rf"{name} was computed in .*bf16 \(train\), but this process would compute in .*fp16 \(train\)"
        ".*same kind of GPU.*amp: false"
    )
    with pytest.raises(InputError, match=words):
        check_settings(runs_here()[name], tmp_path)


def test_what_an_encoder_was_trained_in_is_compared_too(machine, tmp_path):
    fixed = {"finetuning": FIXED, "evaluation": FIXED}
    name = "finetune_pretrained_n2_seed0"
    machine("new")
    begin(tmp_path, runs_here(**fixed)[name])
    machine("cpu")
    with pytest.raises(InputError, match=re.escape("fp32 (encoder), fp32 (evaluate), fp32 (train). Compared runs")):
        check_settings(runs_here(**fixed)[name], tmp_path)


def test_a_study_that_fixes_it_is_the_same_everywhere(machine, tmp_path):
    fixed = {"pretraining": {**FIXED, "max_steps": 100}, "finetuning": FIXED, "evaluation": FIXED}
    machine("new")
    for run in runs_here(**fixed).values():
        begin(tmp_path, run)
    machine("cpu")
    for run in runs_here(**fixed).values():
        check_settings(run, tmp_path)


def test_a_run_of_an_earlier_version_is_taken_as_it_is(machine, tmp_path):
    machine("new")
    for run in runs_here().values():
        path = Path(tmp_path, "runs", run.name, "settings.json")
        write_text(path, json.dumps({key: value for key, value in run.settings.items() if key != "precision"}))
    machine("cpu")
    for run in runs_here().values():
        check_settings(run, tmp_path)
