# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import time

import pytest
import torch

from benchmarks import step_report
from benchmarks.side_by_side import MIB, Comparison, Floor, Side


@pytest.fixture
def here(monkeypatch):
    """Run the sides of `step_report.measure` in this process: importing MONAI in new processes takes seconds each."""

    def compare(sides, *, reference, runs, warmup, device, threads, results):
        measured = {}
        for name, prepare in sides.items():
            timed, seconds = prepare(), []
            for _ in range(runs):
                begin = time.perf_counter()
                result = timed()
                seconds.append(time.perf_counter() - begin)
            measured[name] = Side(seconds=tuple(seconds), peak=200 * MIB, above=100 * MIB, result=result)
        return Comparison(sides=measured, reference=reference, device=device, threads=torch.get_num_threads())

    def in_a_process(function, *arguments, **options):
        if function is step_report.floor:
            return Floor(matmul=2e10, conv=1e10, copy=5e9)
        return function(*arguments, **options)

    monkeypatch.setattr(step_report, "compare", compare)
    monkeypatch.setattr(step_report, "in_a_process", in_a_process)
    yield
    torch.autograd.set_detect_anomaly(False)
