# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compared runs have the same precision: a job on another kind of GPU is refused with both precisions."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from bundles.common.errors import InputError
from bundles.common.files import write_text
from evidence.study.study import BUNDLES, OF_THE_PLAN, PRETRAIN, SEGMENT
from workflow.precision import check_precision, precision_of, precision_of_run

NAME = "finetune_a"
PLANNED = {
    "kind": "finetuning",
    "needs": ["pretrain_a"],
    "settings": {"commands": {"train": {"options": {}}, "evaluate": {"options": {"amp": False}}}},
}


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on a machine without a GPU, or with an older or newer one."""

    def go(kind):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind != "cpu")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: kind == "new")

    return go


def record(out, name, kind, precision):
    entries = {"kind": kind} | ({} if precision is None else {"precision": precision})
    write_text(out / "runs" / name / "settings.json", json.dumps(entries))


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


def test_a_run_has_the_precision_of_its_commands_and_of_its_encoder(machine, tmp_path):
    machine("new")
    assert precision_of_run(PLANNED, tmp_path) == {"train": "bf16", "evaluate": "fp32"}
    record(tmp_path, "pretrain_a", "pretraining", {"train": "fp16"})
    assert precision_of_run(PLANNED, tmp_path) == {"train": "bf16", "evaluate": "fp32", "encoder": "fp16"}


@pytest.mark.parametrize("other", [NAME, "finetune_b"])
def test_another_precision_than_that_of_a_run_of_its_kind_is_refused(machine, tmp_path, other):
    machine("old")
    record(tmp_path, other, "finetuning", {"train": "bf16", "evaluate": "fp32"})
    words = rf"{other} was computed in .*bf16 \(train\), but .* compute {NAME} in .*fp16 \(train\).*amp: false"
    with pytest.raises(InputError, match=words):
        check_precision(NAME, "finetuning", precision_of_run(PLANNED, tmp_path), tmp_path)
    machine("new")
    check_precision(NAME, "finetuning", precision_of_run(PLANNED, tmp_path), tmp_path)


def test_what_an_encoder_was_trained_in_is_compared_too(machine, tmp_path):
    machine("new")
    record(tmp_path, "finetune_b", "finetuning", {"train": "bf16", "evaluate": "fp32", "encoder": "bf16"})
    record(tmp_path, "pretrain_a", "pretraining", {"train": "fp16"})
    with pytest.raises(InputError, match=r"bf16 \(encoder\).*fp16 \(encoder\)"):
        check_precision(NAME, "finetuning", precision_of_run(PLANNED, tmp_path), tmp_path)


def test_runs_of_another_kind_or_of_an_earlier_version_do_not_count(machine, tmp_path):
    machine("old")
    record(tmp_path, "pretrain_a", "pretraining", {"train": "bf16"})
    record(tmp_path, "finetune_b", "finetuning", None)
    check_precision(NAME, "finetuning", {"train": "fp16", "evaluate": "fp32"}, tmp_path)
