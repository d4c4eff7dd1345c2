# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A planned study whose commands are made up (`made_up_bundle`): the engine is real, and nothing is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.runs.study_plan import write_study_plan
from evidence.study.study_data import prepare_folder
from tools.bundle_runs import PLAN

from ..evidence.made_up_study import made_up_scores, plan_of, planner

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("made_up_bundle.py")
CURVE = {"n": [2], "seeds": [0, 1], "encoder_per_seed": True}
FIXED = {"amp": False}  # its precision is known without PyTorch


def write_made_up(out: Path, *, steps: int = 5, gain: float = 0.05, **changes: Any) -> list[str]:
    """Plan a study of made-up commands, and return the names of its runs.

    Args:
        out: folder of the study.
        steps: steps of each command.
        gain: what an encoder gains in Dice.
        changes: entries of the study.
    """
    entries = {"curve": CURVE, "ablation": None, "search": None, "pretraining": {"max_steps": 100, **FIXED}}
    entries |= {"finetuning": {"learning_rate": 0.02, **FIXED}, "evaluation": FIXED}
    made = planner(**{**entries, **changes})
    prepare_folder(out, "made_up")
    write_study_plan(made, out)
    runs = {
        run.name: run
        for run in plan_of(made, [part for part in ("curve", "headroom", "search") if getattr(made.study, part)]).runs
    }
    content = json.loads((out / PLAN).read_text())
    for name, planned in content["runs"].items():
        scores = out / "scores" / f"{name}.csv"
        scores.parent.mkdir(exist_ok=True)
        rows = made_up_scores(runs[name], gain=gain) if runs[name].kind == "finetuning" else []
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        scores.write_text("\n".join(["case,label,dice,nsd,hd95", *lines]) + "\n")
        for command in planned["commands"]:
            what = f"{{out}}/scores/{name}.csv" if command["name"] == "evaluate" else f"weights of {name}"
            result = (
                "{out}/"
                + f"runs/{name}/{'train/models/encoder.pt' if planned['kind'] == 'pretraining' else command['result']}"
            )
            command |= {
                "result": result.removeprefix(f"{{out}}/runs/{name}/"),
                "words": [str(PROGRAM), result, what, str(steps)],
            }
    (out / PLAN).write_text(json.dumps(content))
    return list(content["runs"])


def start(
    out: Path,
    target: str = "few_label_curve",
    *,
    profile: str = "local",
    more: Sequence[str] = (),
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Start the engine in a process group of its own.

    Args:
        out: folder of the study.
        target: what to make.
        profile: see `workflow.start.read_profile`.
        more: options of Snakemake.
        log: gets its output; None: ``OUT/../engine.log``.
        environment: its environment; None: `own_environment`.
    """
    file = open(log or out.parent / "engine.log", "a")
    return subprocess.Popen(
        command(out, target, profile, more),
        cwd=ROOT,
        env=environment or own_environment(),
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def command(out: Path, target: str, profile: str = "local", more: Sequence[str] = ()) -> list[str]:
    """The command line that carries out what is planned in a folder."""
    words = [sys.executable, "-m", "workflow", target, "--out", str(out), "--as_planned", "--profile", profile]
    return [*words, "--threads", "1", "--shared_disk", *more]


def own_environment() -> Mapping[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(out: Path, target: str = "few_label_curve", **options: Any) -> str:
    """Carry out a workflow to its end, and return what it said."""
    log = out.parent / "engine.log"
    process = start(out, target, **options)
    assert process.wait(timeout=500) == 0, log.read_text()[-6000:]
    return log.read_text()


def steps_of(out: Path) -> dict[str, list[int]]:
    """Folder to the steps that its commands have computed, in order."""
    found = {}
    for path in sorted(out.glob("runs/*/*/**/steps")):
        found[str(path.parent.relative_to(out / "runs"))] = [
            int(line.split()[0]) for line in path.read_text().splitlines()
        ]
    return found
