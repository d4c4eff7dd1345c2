# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Progress of a plan: which runs are done, running and left, and the estimated time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from ..results.records import DONE, read_done
from . import run_claim as claims
from .headroom import untrained
from .plan import Plan, Run

UNTRAINED_MINUTES = 1.0  # of the pre-training of the floor, which reads the scans and writes random weights


def state_of(run: Run, out: Path) -> str:
    """Return whether a run is ``done``, ``running`` or ``left``."""
    folder = out / "runs" / run.name
    if (folder / DONE).exists():
        return "done"
    return "running" if claims.is_held(folder) else "left"


def minutes_of(plan: Plan, out: Path) -> Callable[[Run], float]:
    """Return a function that estimates the minutes of a run.

    The estimate is the median of finished runs of the same kind and steps. Without one, it is the median of finished
    runs of the same kind, each scaled to the run's steps; else the study's value for its own steps, scaled likewise.
    """
    taken: dict[tuple, list[float]] = {}
    for run in plan.runs:
        if done := read_done(out / "runs" / run.name):
            minutes, steps = done["seconds"] / 60, run.facts["steps"]
            taken.setdefault((run.kind, steps), []).append(minutes)
            if not untrained(run):
                taken.setdefault((run.kind,), []).append(minutes / steps)

    def estimate(run: Run) -> float:
        steps = run.facts["steps"]
        if (run.kind, steps) in taken:
            return statistics.median(taken[run.kind, steps])
        if untrained(run):
            return UNTRAINED_MINUTES
        if (run.kind,) in taken:
            return steps * statistics.median(taken[(run.kind,)])
        return getattr(plan.study.minutes, run.kind) * steps / _own_steps(plan, run.kind)

    return estimate


def _own_steps(plan: Plan, kind: str) -> int:
    """Steps that the study's minutes of a kind are for: the most of a fine-tuning, and those of most pre-trainings.

    Of a propagation, the scans are counted.
    """
    if kind == "finetuning":
        steps = plan.study.steps
        return steps if isinstance(steps, int) else max(steps.values())
    if kind == "propagation":
        return max(run.facts["steps"] for run in plan.runs if run.kind == kind)
    return statistics.mode(run.facts["steps"] for run in plan.runs if run.kind == kind and not untrained(run))


def overview(plan: Plan, out: Path, *, names: bool, processes: int = 1) -> str:
    """Describe what is done, running and left, with an estimate of the time left.

    Args:
        plan: the plan.
        out: folder of the study.
        names: list every run with its state and time.
        processes: a number of processes for which the time is given as well.
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
        if processes > workers:
            summary += f", {_clock((left + running) / processes)} with {processes}"
    if plan.chains:
        summary += f"; not counted: what the chains of doubled steps add after {'; '.join(plan.chains)}"
    return "\n".join([*lines, summary])


def _clock(minutes: float) -> str:
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min" if minutes >= 60 else f"{max(1, round(minutes))} min"
