# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The page shows each figure and each failure of the results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.page import page_text

PAGE = Path(__file__).resolve().parents[3] / "docs" / "explanation" / "gpu.md"
RESULTS = PAGE.with_suffix(".json")


def done(title: str, *checks: dict, **rest) -> dict:
    return {"title": title, "status": "done", "checks": list(checks), **rest}


def check(name: str, ok: bool | None = None, **values) -> dict:
    return {"check": name, "ok": ok, "text": f"text of {name}", **values}


ERRORS = {"inference": 1e-7, "output": 1.5e-7, "input gradient": 2e-7, "weight gradient": 3e-7}


def test_every_part_has_its_table():
    peak = {"ours": 8 * 2**30, "stock": 20 * 2**30}
    step = check("pre-training, bf16", crops="4 crops", seconds={"ours": [0.3, 0.2], "stock": [0.8, 0.6]}, peak=peak)
    figures = {"compiled_peak": 2**30, "start": 1.0}
    plain = check("segmentation, bf16, --compile None", compile=None, step=0.02, gain=1.0, **figures)
    decoder = check("segmentation, bf16, --compile decoder", compile="decoder", step=0.016, gain=1.25, **figures)
    kernel = {"kernel": "gemm", "calls": 7, "ms": 12.5}
    run = check("scratch, n = 2, 100 steps, seed 0", True, dice=[[0.5]])
    found = {"n": 2, "steps": 400, "scratch": 0.5, "pre-trained": 0.53, "difference": 0.03}
    found |= {"interval": [0.01, 0.05], "seeds_interval": None}
    curve = check("curve, n = 2", curve=found, converged=False)
    text = page_text(
        {
            "dry_run": False,
            "date": "2026-11-28",
            "parts": {
                "machine": done("Card", check("GPU", True)),
                "parity": done("Parity", check("stage, fp32", True, ours=ERRORS, stock=ERRORS), check("lost", False)),
                "steps": done("Steps", step, plain, decoder, check("segmentation, fp32", False)),
                "kernels": done("Kernels", check("pre-training, bf16", True, rows=[kernel], total_ms=50.0)),
                "curve": done("Curve", run, curve, check("cut")),
                "workflows": {"title": "Runs", "status": "out of time", "why": "not finished within 9 s", "checks": []},
            },
        }
    )
    assert "Not run yet" not in text and "Results of 2026-11-28" in text
    assert "- text of GPU" in text and "- **failed**: text of lost" in text
    assert "| stage, fp32 | 1.5e-07 (1.5e-07) | 2.0e-07 (2.0e-07) | 3.0e-07 (3.0e-07) |" in text
    assert "| pre-training, bf16: 4 crops | 0.300 | 0.800 | 2.67 | 8.0 | 20.0 | 0.40 |" in text
    assert "- **failed**: text of segmentation, fp32" in text
    assert "| `gemm` | 7 | 12.50 | 25% |" in text
    line = "| 2 | 400, not converged | 0.500 | 0.530 | +0.030 | +0.010 to +0.050 | none |"
    assert line in text and "- text of cut" in text and "text of scratch" not in text
    assert "| segmentation, bf16, not compiled | 0.0200 | 1.00 | 1.0 | 1 |" in text
    assert "| segmentation, bf16, --compile decoder | 0.0160 | 1.25 | 1.0 | 1 |" in text
    assert "text of segmentation, bf16, --compile" not in text
    assert "**Out of time**: not finished within 9 s." in text


def test_the_results_are_kept_beside_the_page(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--report", str(tmp_path / "gpu.md")]) == 1
    assert "gpu_check.json does not exist: run the check first" in capsys.readouterr().err
    results = {"dry_run": False, "date": "2026-11-28", "parts": {"machine": done("Card", check("GPU", True))}}
    (tmp_path / "gpu_check.json").write_text(json.dumps(results))
    assert main(["--out", str(tmp_path), "--report", str(tmp_path / "gpu.md")]) == 0
    assert "- text of GPU" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text()) == results


def test_the_page_in_the_documentation_is_that_of_the_kept_results():
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    assert PAGE.read_text() == page_text(kept)
