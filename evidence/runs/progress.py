# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Progress of a plan: which runs are done, running and left, and the estimated time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from ..results.records import DONE, read_done
from . import run_claim as claims
from .plan import Plan, Run


def state_of(run: Run, out: Path) -> str:
    """Return whether a run is ``done``, ``running`` or ``left``."""
    folder = out / "runs" / run.name
    if (folder / DONE).exists():
        return "done"
    return "running" if claims.is_held(folder) else "left"


def minutes_of(plan: Plan, out: Path) -> Callable[[Run], float]:
    """Return a function that estimates the minutes of a run.

    The estimate is the median of finished runs of the same kind and steps, else of the same kind, else the study's
    value.
    """
    taken: dict[tuple, list[float]] = {}
    for run in plan.runs:
        if done := read_done(out / "runs" / run.name):
            for key in ((run.kind,), (run.kind, run.facts["steps"])):
                taken.setdefault(key, []).append(done["seconds"] / 60)

    def minutes(run: Run) -> float:
        for key in ((run.kind, run.facts["steps"]), (run.kind,)):
            if key in taken:
                return statistics.median(taken[key])
        return getattr(plan.study.minutes, run.kind)

    return minutes


def overview(plan: Plan, out: Path, *, names: bool) -> str:
    """Describe what is done, running and left, with an estimate of the time left.

    Args:
        plan: the plan.
        out: folder of the study.
        names: list every run with its state and time.
    """
    states = {run.name: state_of(run, out) for run in plan.runs}
    minutes = minutes_of(plan, out)
    lines = []
    if names:
        for run in plan.runs:
            done = read_done(out / "runs" / run.name)
            duration = f"{done['seconds'] / 60:.1f} min" if done else f"about {minutes(run):.0f} min"
            lines.append(f"{states[run.name]:<8} {run.name:<60} {duration}")
    count = {state: list(states.values()).count(state) for state in ("done", "running", "left")}
    left = sum(minutes(run) for run in plan.runs if states[run.name] == "left")
    running = sum(minutes(run) / 2 for run in plan.runs if states[run.name] == "running")
    summary = f"{count['done']} of {len(plan.runs)} runs done, {count['running']} running, {count['left']} left"
    if left or running:
        workers = max(1, count["running"])
        summary += f"; about {_clock((left + running) / workers)} with {workers} process{'es' * (workers > 1)}"
    return "\n".join([*lines, summary])


def _clock(minutes: float) -> str:
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min" if minutes >= 60 else f"{max(1, round(minutes))} min"
