# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What of a plan is done, running and left, and how long that will take."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from ..results.records import DONE, read_done
from . import run_claim as claims
from .plan import Plan, Run

MINUTES = {"pretraining": 10.0, "finetuning": 5.0}  # where neither a finished run nor the study says more


def state_of(run: Run, out: Path) -> str:
    """``done``, ``running`` or ``left``."""
    folder = out / "runs" / run.name
    if (folder / DONE).exists():
        return "done"
    return "running" if claims.is_held(folder) else "left"


def minutes_of(plan: Plan, out: Path) -> Callable[[Run], float]:
    """How long a run takes: the median of the finished ones of its kind and steps, else of its kind, else what the study says."""
    taken: dict[tuple, list[float]] = {}
    for run in plan.runs:
        if done := read_done(out / "runs" / run.name):
            for key in ((run.kind,), (run.kind, run.facts["steps"])):
                taken.setdefault(key, []).append(done["seconds"] / 60)

    def minutes(run: Run) -> float:
        for key in ((run.kind, run.facts["steps"]), (run.kind,)):
            if key in taken:
                return statistics.median(taken[key])
        return (plan.study.minutes or {}).get(run.kind, MINUTES[run.kind])

    return minutes


def overview(plan: Plan, out: Path, *, names: bool) -> str:
    """What is done, running and left, with an estimate of the time left."""
    states = {run.name: state_of(run, out) for run in plan.runs}
    minutes = minutes_of(plan, out)
    lines = []
    if names:
        for run in plan.runs:
            done = read_done(out / "runs" / run.name)
            time_of = f"{done['seconds'] / 60:.1f} min" if done else f"about {minutes(run):.0f} min"
            lines.append(f"{states[run.name]:<8} {run.name:<60} {time_of}")
    count = {state: list(states.values()).count(state) for state in ("done", "running", "left")}
    left = sum(minutes(run) for run in plan.runs if states[run.name] == "left")
    running = sum(minutes(run) / 2 for run in plan.runs if states[run.name] == "running")
    words = f"{count['done']} of {len(plan.runs)} runs done, {count['running']} running, {count['left']} left"
    if left or running:
        workers = max(1, count["running"])
        words += f"; about {_clock((left + running) / workers)} with {workers} process{'es' * (workers > 1)}"
    return "\n".join([*lines, words])


def _clock(minutes: float) -> str:
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min" if minutes >= 60 else f"{max(1, round(minutes))} min"
