# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Both sides of the attention benchmark compute the same; the benchmark reports its numbers."""

from __future__ import annotations

import json

import pytest

from benchmarks.attention import MODES, SIDES, main, stage_side, tokens

TINY = {"feature_size": 12, "roi": (32, 32, 64), "batch": 1, "device": "cpu", "precision": "fp32"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [1, 2, 4])
def test_both_sides_compute_the_same(stage, mode):
    fast, stock = (stage_side(fast=fast, mode=mode, stage=stage, **TINY)() for fast in (True, False))
    assert fast == pytest.approx(stock, rel=1e-4) and fast != 0


def test_a_stage_gets_the_tokens_that_it_sees_in_the_encoder():
    assert tokens(stage=1, feature_size=48, roi=(96, 96, 96), batch=2).shape == (2, 48, 48, 48, 48)
    assert tokens(stage=4, feature_size=48, roi=(96, 96, 64), batch=1).shape == (1, 384, 6, 6, 4)


def test_the_command_prints_a_table_per_stage_and_writes_the_numbers(here, tmp_path, capsys):
    options = ["--feature_size", "12", "--roi", "32", "32", "32", "--batch", "1", "--runs", "2", "--stages", "2", "3"]
    assert main([*options, "--device", "cpu", "--precision", "fp32", "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "stage 2, 8 x 8 x 8 tokens, forward + backward; ratios to stock" in shown
    assert "times" in shown and "GFLOP" in shown and "of the" in shown
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(case["stage"], case["mode"]) for case in results["cases"]] == [(s, m) for s in (2, 3) for m in MODES]
    assert (
        results["options"]["roi"] == [32, 32, 32] and results["machine"]["cores"] >= 1 and results["floor"]["copy"] > 0
    )
    for case in results["cases"]:
        assert set(case["sides"]) == set(SIDES) and case["sides"]["stock"]["ratio"] == 1
        for side in case["sides"].values():
            assert len(side["seconds"]) == 2 and side["flops"] > 0 and side["bytes"] > 0 and side["limit"] > 0
    forward, both = results["cases"][:2]
    assert both["sides"]["stock"]["flops"] > 2 * forward["sides"]["stock"]["flops"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--roi", "40", "64", "64"], r"--roi \[40, 64, 64\]: must be multiples of 32"),
        (["--feature_size", "20"], "--feature_size 20: must be a multiple of 12"),
        (["--runs", "0"], "--runs 0: must be 1 or more"),
        (["--device", "cpu", "--precision", "bf16"], "--precision bf16 needs a GPU"),
    ],
)
def test_what_cannot_run_is_refused(wrong, words, capsys):
    assert main(["--device", "cpu", "--precision", "fp32", *wrong]) == 1
    assert words.replace("\\", "") in capsys.readouterr().err
