# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Verdicts of the parts: a wrong network fails, and so does a lost step; an exception costs one result."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from benchmarks.gpu_check import bias_gradient, parity
from benchmarks.gpu_check.parts import MARK, attempt, tell
from benchmarks.gpu_check.workflows import training_facts, waits_of
from bundles.common.networks.fast.attention import FastWindowAttention

SMALL = (parity.CPU | {"depths": [2, 1, 1, 1]}, 1)


def told(capsys) -> list[dict]:
    return [json.loads(line[1:]) for line in capsys.readouterr().out.split("\n") if line.startswith(MARK)]


def compare(capsys) -> dict[str, dict]:
    parity.compare("x", lambda fast: parity.stage_blocks(*SMALL, fast), (1, 12, 8, 8, 4), "cpu")
    return {check["check"]: check for check in told(capsys)}


def test_the_fast_path_agrees(capsys):
    checks = compare(capsys)
    assert set(checks) == {"x, fp32", "x, bf16"} and all(check["ok"] for check in checks.values())


@pytest.mark.parametrize("fault", ["forward", "bias gradient"])
def test_a_wrong_fast_path_is_found(capsys, monkeypatch, fault):
    right = FastWindowAttention.position_bias

    def wrong(self, tokens):
        bias = right(self, tokens)
        return bias.flip(-1) * 20 if fault == "forward" else bias.detach()

    monkeypatch.setattr(FastWindowAttention, "position_bias", wrong)
    checks = compare(capsys)
    assert not checks["x, fp32"]["ok"]
    if fault == "forward":
        assert "too far: inference, output" in checks["x, fp32"]["text"]


@pytest.mark.parametrize("fault", [None, "sum", "bits"])
def test_a_wrong_gradient_of_the_bias_is_found(capsys, monkeypatch, fault):
    right, calls = bias_gradient.fused_attention, []

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, bias):
            return bias.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad * {"sum": 1.0001, "bits": 1 + 1e-6 * len(calls)}[fault]

    def wrong(qkv, bias, plan, scale):
        return right(qkv, bias if fault is None else Wrong.apply(bias), plan, scale)

    monkeypatch.setattr(bias_gradient, "fused_attention", wrong)
    case = bias_gradient.CASES["32 tokens, width 4"]
    bias_gradient.compare("x", case, torch.float32, torch.device("cpu"), shifted=False)
    (check,) = told(capsys)
    assert check["ok"] is (fault is None) and check["equal"] is (fault != "bits")


def test_a_broken_yardstick_lets_nothing_pass():
    assert parity.tolerance(1e35, "bf16") == parity.CEILING == parity.tolerance(float("nan"), "bf16")
    assert parity.tolerance(1e-3, "fp32") == 2e-3 and parity.tolerance(0.0, "fp32") == 1e-5


def write_training(folder, *, steps, losses=None, skipped=0):
    (folder / "models").mkdir(exist_ok=True)
    with open(folder / "training_log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["step", "loss"])
        writer.writeheader()
        writer.writerows({"step": step, "loss": loss} for step, loss in zip(steps, losses or steps, strict=True))
    content = {"trainer": {"skipped_steps": skipped}, "settings": {"precision": "bf16"}}
    torch.save(content, folder / "models" / "last.pt")


def test_a_training_is_judged_by_its_log_and_checkpoint(tmp_path):
    write_training(tmp_path, steps=[1, 2, 3])
    facts = training_facts(tmp_path, steps=range(1, 4))
    assert facts["ok"] and facts["losses"] == [1, 2, 3] and facts["precision"] == "bf16"
    write_training(tmp_path, steps=[1, 3])
    assert not training_facts(tmp_path, steps=range(1, 4))["ok"]
    write_training(tmp_path, steps=[1, 2, 3], losses=[1.0, float("nan"), 2.0])
    assert not training_facts(tmp_path, steps=range(1, 4))["ok"]
    write_training(tmp_path, steps=[1, 2, 3], skipped=1)
    assert not training_facts(tmp_path, steps=range(1, 4))["ok"]


def test_waits_are_counted_by_place():
    warning = "UserWarning: called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)"
    lines = [f"/a/site/monai/losses/dice.py:70: {warning}"] * 3 + [f"/b/bundles/common/run/x.py:9: {warning}"]
    facts = waits_of("\n".join([*lines, "other output", "a.py:1: UserWarning: else"]), steps=2)
    assert facts["waits"] == 4 and facts["waits_per_step"] == 2.0
    assert facts["places"] == [("monai/losses/dice.py:70", 3), ("bundles/common/run/x.py:9", 1)]


def test_an_exception_costs_one_result(capsys):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")

    attempt("first", too_large)
    attempt("second", lambda: {}["key"])
    attempt("third", lambda: tell("third", ok=True, text="fine"))
    first, second, third = told(capsys)
    assert first["text"] == "first: too little GPU memory (CUDA out of memory)" and first["ok"] is False
    assert second["text"] == "second: KeyError: 'key'" and third["ok"]
