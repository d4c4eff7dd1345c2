# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Plan all parts of a study into its folder: ``plan.json`` for the rules of workflow/, ``outline.json`` for the report."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from bundles.common.files import write_text
from tools.bundle_runs import Run, unique, write_plan

from ..results.records import OUTLINE
from ..study.reading import read_study
from ..study.study import Study
from ..study.study_data import prepare_folder
from .headroom import untrained
from .plan import Planner
from .planning import planner_of

PARTS = ("curve", "headroom", "ablation", "search")
UNTRAINED_MINUTES = 1.0  # minutes of the pre-training of the floor, which reads the scans and writes random weights


def plan_study(name: str, *, data: Path | None, out: Path) -> None:
    """Read a study and its data, and write what is to be run.

    Args:
        name: one of evidence/studies, or the path of a YAML file.
        data: folder or list of a data set in MSD form; None: synthetic patients, if the study has some.
        out: folder of the study; made if it does not exist.

    Raises:
        InputError: the study or the data are wrong, ``out`` belongs to something else, or a run in it was made with
            other settings.
    """
    study = read_study(name)
    prepare_folder(out, study.name)
    write_study_plan(planner_of(study, data=data, out=out), out)


def write_study_plan(planner: Planner, out: Path) -> None:
    """Write ``plan.json`` and ``outline.json`` of a study.

    Args:
        planner: planner of the study.
        out: folder of the study.

    Raises:
        InputError: a run was made with other settings.
    """
    study = planner.study
    parts = {part: getattr(planner, part)() for part in PARTS if part == "curve" or getattr(study, part)}
    chains = planner.chains()
    candidates = [
        run for each in chains.values() for runs in (each.links, each.converged) for run in sum(runs.values(), [])
    ]
    runs = unique([*(run for each in parts.values() for run in each), *candidates])
    write_plan(
        out,
        workflow="study",
        name=study.name,
        source=study.source,
        runs=[(run, minutes_of(run, study, runs)) for run in runs],
        parts={part: [run.name for run in each] for part, each in parts.items()},
        chains={
            str(n): {
                kind: {str(steps): [run.name for run in each] for steps, each in getattr(chain, kind).items()}
                for kind in ("links", "converged")
            }
            for n, chain in chains.items()
        },
    )
    write_text(out / OUTLINE, json.dumps(planner.outline(), indent=1) + "\n")


def minutes_of(run: Run, study: Study, runs: list[Run]) -> float:
    """Return the study's rough minutes for a run, in proportion to its steps.

    Args:
        run: one of the runs.
        study: the study. Its minutes are for the most steps of a fine-tuning, for the steps that most pre-trainings
            have, and for the propagation to the most scans.
        runs: all runs of the study.
    """
    if untrained(run):
        return UNTRAINED_MINUTES
    if run.kind == "finetuning":
        own = study.steps if isinstance(study.steps, int) else max(study.steps.values())
    else:
        steps = [each.facts["steps"] for each in runs if each.kind == run.kind and not untrained(each)]
        own = statistics.mode(steps) if run.kind == "pretraining" else max(steps)
    return getattr(study.minutes, run.kind) * run.facts["steps"] / own
