# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Part 5: seconds a step and peak memory of the bundles' own training steps, fast against ``--fast false``; compiled.

Of ``--compile`` a dry run measures only ``decoder``, by a backend that generates no code: a CPU would take minutes.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import pretrain_step, segmentation_step

from .parts import Settings, attempt, tell

BENCHMARKS = {"pre-training": pretrain_step, "segmentation": segmentation_step}
STEPS = {"bf16": 3, "fp32": 2}  # steps of a timed run
COMPILED_STEPS = 5  # steps of a timed run with --compile
LEAST = 60  # seconds that a further --compile may take: at base size it builds for a minute
ROUNDS = {"bf16": 2, "fp32": 1}  # rounds of ours, stock; then stock, ours


def job_of(module: object, *, precision: str, settings: Settings, steps: int) -> object:
    """Return the job of a benchmark: feature size 48, four crops of 96^3; tiny in a dry run."""
    size = (
        {"feature_size": 12, "roi": (32, 64, 64), "batch": 1}
        if settings.dry_run
        else {"feature_size": 48, "roi": (96, 96, 96), "batch": 4}
    )
    return module.Job(**size, steps=steps, device=settings.device, precision=precision)


def run(settings: Settings) -> None:
    """Time the steps in turns."""
    for name, module in BENCHMARKS.items():
        for precision in ("fp32",) if settings.dry_run else ("bf16", "fp32"):
            job = job_of(
                module, precision=precision, settings=settings, steps=1 if settings.dry_run else STEPS[precision]
            )
            label = f"{name}, {precision}"
            attempt(label, lambda label=label, module=module, job=job: compare(label, module, job))
            if precision == "bf16" or (settings.dry_run and name == "pre-training"):
                attempt(
                    f"{label}, cudnn.benchmark",
                    lambda label=label, module=module, job=job: with_trials(label, module, job),
                )
    compiled = {"segmentation": segmentation_step} if settings.dry_run else dict(reversed(BENCHMARKS.items()))
    for name, module in compiled.items():
        precision = "fp32" if settings.dry_run else "bf16"
        job = job_of(module, precision=precision, settings=settings, steps=1 if settings.dry_run else COMPILED_STEPS)
        label = f"{name}, {precision}"
        attempt(
            f"{label}, --compile", lambda label=label, module=module, job=job: compiling(label, module, job, settings)
        )


def compiling(label: str, module: object, job: object, settings: Settings) -> None:
    """Report seconds a step and peak memory with each ``--compile``, and how long compiling took."""
    plain = None
    for choice in (None, "decoder") if settings.dry_run else (None, "decoder", "network", "graphs"):
        name = f"{label}, --compile {choice}"
        if choice and settings.left < LEAST:
            tell(name, ok=None, text=f"{name}: left out, fewer than {LEAST} s are left of the part")
            continue
        torch.compiler.reset()
        try:
            options = (
                {"compile": choice, "compile_backend": "aot_eager"}
                if settings.dry_run and choice
                else {"compile": choice}
            )
            run_steps = module.bundle_side(job, fast=True, **options)
            begin = time.perf_counter()
            run_steps()
            run_steps()  # the graphs are recorded in the second run
            first = time.perf_counter() - begin
            taken, peak = timed(run_steps, job.device)
        except Exception as error:  # whatever the compiler raises: the next choice may work
            tell(name, ok=False, text=f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        finally:
            run_steps = None
            gc.collect()
            if job.device == "cuda":
                torch.cuda.empty_cache()
        seconds = taken / job.steps
        plain = plain or seconds
        text = f"{name}: {seconds:.4f} s a step ({plain / seconds:.2f}x), {first:.0f} s until then"
        text += f", peak {peak / 2**30:.1f} GiB" if peak else ""
        tell(
            name,
            ok=None,
            text=text,
            compile=choice,
            step=seconds,
            gain=plain / seconds,
            start=first,
            compiled_peak=peak,
        )


def compare(label: str, module: object, job: object) -> None:
    """Report seconds a step and peak memory of both sides.

    Each is built again in each turn, so that neither sees the other's memory.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    peaks: dict[bool, list[int]] = {True: [], False: []}
    rounds = 1 if job.device == "cpu" else ROUNDS[job.precision]
    for number in range(rounds):
        for fast in (True, False) if number % 2 == 0 else (False, True):
            run_steps = module.bundle_side(job, fast=fast)
            run_steps()  # warm-up: cuDNN chooses its algorithms
            taken, peak = timed(run_steps, job.device)
            seconds[fast].append(taken / job.steps)
            peaks[fast].append(peak)
            del run_steps
            gc.collect()
            if job.device == "cuda":
                torch.cuda.empty_cache()
    ours, stock = (statistics.median(seconds[fast]) for fast in (True, False))
    memory, stock_memory = (max(peaks[fast]) for fast in (True, False))
    crops = f"{job.batch} crops of {' x '.join(map(str, job.roi))}, feature size {job.feature_size}"
    text = f"{label}: {ours:.3f} s a step, stock {stock:.3f} ({stock / ours:.2f}x)"
    if job.device == "cuda":
        text += f"; peak {memory / 2**30:.1f} GiB, stock {stock_memory / 2**30:.1f} ({memory / stock_memory:.2f})"
    tell(
        label,
        ok=None,
        text=f"{text}; {crops}",
        seconds={"ours": seconds[True], "stock": seconds[False]},
        peak={"ours": memory, "stock": stock_memory} if job.device == "cuda" else None,
        crops=crops,
    )


def with_trials(label: str, module: object, job: object) -> None:
    """Report seconds a step without and with ``cudnn.benchmark``, by which cuDNN tries all algorithms for each new shape.

    The bundles leave it off (`start_run.choose_algorithms`), because its gain was not measured.
    """
    taken = {}
    for trials in (False, True):
        torch.backends.cudnn.benchmark = trials
        try:
            run_steps = module.bundle_side(job, fast=True)
            run_steps()  # the trials
            taken[trials] = timed(run_steps, job.device)[0] / job.steps
        finally:
            torch.backends.cudnn.benchmark = False
            run_steps = None
            gc.collect()
    name = f"{label}, cudnn.benchmark"
    text = f"{name}: {taken[True]:.4f} s a step, without {taken[False]:.4f} ({taken[False] / taken[True]:.2f}x)"
    tell(name, ok=None, text=text, with_trials=taken[True], without_trials=taken[False])


def timed(function: Callable[[], object], device: str) -> tuple[float, int]:
    """Return the seconds of a call, and the peak of the GPU's memory in bytes (0 on a CPU)."""
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated()
