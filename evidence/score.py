# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write ``done.json`` of the runs whose commands have ended: settings, time and scores, for the report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundles.common.cases.failures import reason_of
from bundles.common.data.case_names import case_names
from bundles.common.data.list_forms.list_file import first_file
from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.common.words import counted
from bundles.segmentation.results.scores_table import read_scores
from tools.bundle_runs import DONE, LISTS, SETTINGS, Run, has_ended, read_json, read_plan, spent

from .results.carried_labels import compare_with_truth, scores_of_masks
from .results.encoder_figures import figures_of
from .results.records import METRICS

logger = logging.getLogger(__name__)


def score_ended(out: Path) -> list[str]:
    """Score every run of a planned study that has ended and is not scored yet, and return their names.

    Args:
        out: folder of the study.

    Raises:
        InputError: there is no plan, or a file of a run is damaged; the other runs are scored first.
    """
    plan, scored, faults = read_plan(out), [], []
    for name, planned in plan["runs"].items():
        folder = out / "runs" / name
        if not (folder / DONE).exists() and all(has_ended(folder, command["name"]) for command in planned["commands"]):
            try:
                finish(planned_run(plan, name, out), folder)
            except InputError as error:
                faults.append(f"{name}: {error}")
            except Exception as error:  # a damaged table, mask or report: many libraries raise many kinds
                faults.append(f"{name}: a file in {folder} is damaged ({reason_of(error)}).")
                logger.debug("%s", name, exc_info=error)
            else:
                scored.append(name)
    if faults:
        raise InputError(
            "\n".join(
                [
                    f"{counted(len(faults), 'run')} cannot be scored:",
                    *faults,
                    "Remove the marks (.NAME.done) in the folder of such a run, and start the workflow again: it makes the "
                    "run's files anew.",
                ]
            )
        )
    return scored


def planned_run(plan: Mapping[str, Any], name: str, out: Path) -> Run:
    """Return a run of a plan, with the data lists in its folder; without its commands.

    Args:
        plan: content of ``plan.json``.
        name: name of the run.
        out: folder of the study.

    Raises:
        InputError: one of its lists is damaged.
    """
    planned = plan["runs"][name]
    settings = planned["settings"]
    return Run(
        name=name,
        kind=planned["kind"],
        facts=settings["facts"],
        commands=(),
        lists={
            path.stem: read_json(path, "start the workflow again, which writes it anew")
            for path in sorted((out / "runs" / name / LISTS).glob("*.json"))
        },
        cases=settings["cases"],
        row=settings["row"],
        needs=tuple(planned["needs"]),
    )


def finish(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``done.json`` of a run and return its content.

    Args:
        run: the run.
        folder: its folder.

    Raises:
        InputError: its settings are damaged.
    """
    done = {"settings": read_json(folder / SETTINGS, "start the workflow again, which goes on with the run")}
    done["seconds"] = round(spent(folder), 1)
    if run.kind == "pretraining":
        done["figures"] = figures_of(folder, run.settings)
    if run.kind == "propagation":
        done["carried"] = compare_with_truth(run, folder)
    if run.kind == "finetuning":
        table = folder / "evaluation" / "scores.csv"
        done["scores"] = _planned_scores(read_scores(table), run) if table.is_file() else scores_of_masks(run, folder)
    write_text(folder / DONE, json.dumps(done, indent=1) + "\n")
    return done


def _planned_scores(rows: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """Return the scores for ``done.json``: None instead of NaN, and the study's names of the cases.

    The evaluation names the cases so that they are unique in its own list, the study so that they are unique in all.
    """
    scored = next(content["test"] for content in run.lists.values() if "test" in content)
    files = [first_file(case) for case in scored]
    names = case_names(files)
    planned = {names[file]: name for file, name in zip(files, run.cases["scored"], strict=True)}
    return [
        {**row, "case": planned[row["case"]]}
        | {metric: None if math.isnan(row[metric]) else row[metric] for metric in METRICS}
        for row in rows
    ]
