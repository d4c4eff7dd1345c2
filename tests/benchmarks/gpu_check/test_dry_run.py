# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The whole check at tiny size on the CPU, and what happens if something is missing, slow or broken."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.page import NOT_RUN
from benchmarks.gpu_check.parts import PARTS

ROOT = Path(__file__).resolve().parents[3]


def results_in(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry_run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    parts = results_in(tmp_path)["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(PARTS, "done")
    checks = {(name, check["check"]): check for name, part in parts.items() for check in part["checks"]}
    assert all(check["text"] in done.stdout for check in checks.values())

    assert checks["machine", "software"]["versions"]["torch"] and checks["machine", "modules"]["missing"] == []
    errors = checks["bias_gradient", "64 tokens, width 12, shifted, float32"]["errors"]
    assert all(0 < error < 1e-6 for error in errors.values()) and len(errors) == 4
    parity = checks["parity", "stage 1, preset cpu (64 tokens, width 12), fp32"]
    assert all(0 < parity["ours"][part] < 1e-5 for part in ("inference", "output", "input gradient", "weight gradient"))
    rounded = checks["parity", "stage 1, preset cpu (64 tokens, width 12), bf16"]["ours"]["output"]
    assert 1e-4 < rounded < 2e-2  # the precision was really another one
    for training in ("pre-training", "fine-tuning"):
        first, whole = (checks["workflows", f"tiny: {training}{end}"] for end in ("", ", resumed"))
        assert (first["steps"], whole["steps"]) == (4, 6) and whole["losses"][:4] == first["losses"]
        assert whole["skipped_steps"] == 0 and all(map(math.isfinite, whole["losses"]))
    assert checks["workflows", "tiny: evaluation"]["organs"] > 0
    assert checks["workflows", "tiny: inference"]["masks"] == 1
    for name in ("pre-training, fp32", "segmentation, fp32"):
        assert all(seconds > 0 for side in checks["steps", name]["seconds"].values() for seconds in side)
        rows = checks["kernels", name]["rows"]
        assert len(rows) == 10 and [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)

    assert checks["steps", "segmentation, fp32, --compile decoder"]["step"] > 0
    assert checks["steps", "pre-training, fp32, cudnn.benchmark"]["with_trials"] > 0
    for n in (1, 2):
        curve = checks["curve", f"curve, n = {n}"]["curve"]
        assert curve["seeds"] == [0, 1] and curve["patients"] == 2 and 0 < curve["scratch"] < 1
    losses = [checks["curve", f"{arm}, n = 1, 1 steps, seed 0"]["loss"] for arm in ("scratch", "pre-trained")]
    assert losses[0] != losses[1]  # the encoder was loaded
    rows = checks["curve", "scratch, n = 2, 1 steps, seed 0"]["dice"]
    assert len(rows) == 2 and len(rows[0]) == 13

    page = tmp_path / "gpu.md"
    assert main(["--out", str(tmp_path), "--report", str(page)]) == 0
    assert NOT_RUN.strip() in page.read_text()  # a dry run is no result of a GPU


def test_without_a_gpu_each_part_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--out", str(tmp_path), "--only", "machine", "steps", "kernels"]) == 1
    parts = results_in(tmp_path)["parts"]
    assert all(part["status"] == "done" for part in parts.values())
    assert [part["checks"][0]["ok"] for part in parts.values()] == [False] * 3
    assert (
        capsys.readouterr().out.count("left out: PyTorch finds no GPU (--dry_run") == 4
    )  # in its place, in the summary


def test_a_missing_wheel_costs_only_the_parts_that_need_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "site").mkdir()
    hide = (
        "import importlib.util as u\nf = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'ignite' else f(n, *a)\n"
    )
    (tmp_path / "site" / "sitecustomize.py").write_text(hide)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert main(["--out", str(tmp_path), "--dry_run", "--only", "machine", "steps", "kernels"]) == 1
    parts = results_in(tmp_path)["parts"]
    assert next(c for c in parts["machine"]["checks"] if c["check"] == "modules")["missing"] == ["ignite"]
    for name in ("steps", "kernels"):
        (only,) = parts[name]["checks"]
        assert only["text"].startswith("left out: this Python has no ignite; add their wheels")
    assert "missing: ignite" in capsys.readouterr().out


def test_a_part_that_breaks_or_takes_too_long_does_not_stop_the_next(tmp_path, monkeypatch):
    site = tmp_path / "site" / "monai"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise OSError('a broken wheel')")
    monkeypatch.setenv("PYTHONPATH", str(site.parent))
    assert main(["--out", str(tmp_path), "--dry_run", "--only", "parity", "machine"]) == 1
    parts = results_in(tmp_path)["parts"]
    assert parts["parity"]["status"] == "failed"
    assert parts["parity"]["why"] == "exit status 1: OSError: a broken wheel"
    assert parts["machine"]["status"] == "done" and parts["machine"]["checks"]

    (site / "__init__.py").write_text("import time; time.sleep(60)")
    assert main(["--out", str(tmp_path), "--dry_run", "--only", "parity", "machine", "--limit", "7"]) == 1
    parts = results_in(tmp_path)["parts"]
    assert (parts["parity"]["status"], parts["parity"]["why"]) == ("out of time", "not finished within 7 s")
    assert (parts["machine"]["status"], parts["machine"]["why"]) == ("left out", "the time was over (--limit)")


def test_only_completes_the_results_of_an_earlier_call(tmp_path):
    kept = {"title": "x", "status": "done", "checks": [], "seconds": 1}
    earlier = {"dry_run": True, "parts": {"steps": kept, "machine": kept}}
    (tmp_path / "gpu_check.json").write_text(json.dumps(earlier))
    assert main(["--out", str(tmp_path), "--dry_run", "--only", "machine"]) == 0
    parts = results_in(tmp_path)["parts"]
    assert parts["steps"] == kept and parts["machine"]["checks"]
    (tmp_path / "gpu_check.json").write_text(json.dumps(earlier | {"dry_run": False}))  # never mixed
    assert main(["--out", str(tmp_path), "--dry_run", "--only", "machine"]) == 0
    assert set(results_in(tmp_path)["parts"]) == {"machine"}
