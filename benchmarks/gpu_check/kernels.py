# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Part 6: the ten slowest kernels of one training step, from torch.profiler."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from .parts import Settings, attempt, tell
from .steps import BENCHMARKS, job_of

SHOWN = 10


def run(settings: Settings) -> None:
    """Profile one step of pre-training and one of fine-tuning."""
    for name, module in BENCHMARKS.items():
        precision = "fp32" if settings.dry_run else "bf16"
        label = f"{name}, {precision}"
        job = job_of(module, precision=precision, settings=settings, steps=1)
        attempt(
            label, lambda label=label, module=module, job=job: kernels(label, module.bundle_side(job, fast=True), job)
        )


def kernels(label: str, step: object, job: object) -> None:
    """Report the kernels that take the most time of a step, on the GPU (in a dry run: on the CPU)."""
    gpu = job.device == "cuda"
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    column = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if getattr(event, column) > 0]
    if gpu:  # operators carry the time of their kernels as well; count each kernel once
        events = [
            event for event in events if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
        ]  # annotations such as Optimizer.step span kernels, and would count them twice
    events.sort(key=lambda event: -getattr(event, column))
    total = sum(getattr(event, column) for event in events)
    rows = [
        {"kernel": event.key, "calls": event.count, "ms": getattr(event, column) / 1000} for event in events[:SHOWN]
    ]
    share = sum(row["ms"] for row in rows) / (total / 1000) if total else 0.0
    first = f"{rows[0]['kernel'][:60]}, {rows[0]['ms']:.2f} ms" if rows else "nothing"
    text = f"{label}: {total / 1000:.1f} ms of kernels a step, {share:.0%} of it in ten kernels; the slowest: {first}"
    tell(label, ok=bool(rows), text=text, rows=rows, total_ms=total / 1000)
