# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Try as many recipes for training from scratch as for training from an encoder, on patients that the study never scores.

    python -m evidence.search openkbp --data DIR --out OUT

The tuning patients score every recipe; they are in no labelled subset and not among the validation patients. The table
goes to ``search.csv`` and ``search.md``; the best recipe of each arm is to be written into the study's file by hand.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.files import write_text

from .results.mlflow_store import log_missing, open_store, tracking_store
from .results.paired_bootstrap import figure_of, patient_means
from .results.records import read_done, table_of
from .results.table import csv_of
from .run import OUT, arguments_of, call, plan_of, run_plan, say
from .runs.plan import Plan, Planner
from .runs.planning import planner_of
from .runs.progress import overview
from .study.study import read_study
from .study.study_data import prepare_folder

COLUMNS = ("arm", "recipe", "seeds", "seeds_planned", "dice", "sd_patients", "best")


def search_rows(plan: Plan, planner: Planner, out: Path) -> list[dict[str, Any]]:
    """A row for each arm and recipe: mean Dice over seeds and tuning patients, then labels; NaN where nothing is finished.

    ``best`` marks the arm's highest Dice, once all recipes of the arm are finished.
    """
    labels, absent = plan.outline["labels"], plan.outline["absent"]
    rows = []
    for arm in planner.study.arms:
        of_arm = []
        for recipe in planner.recipes(arm):
            runs = [run for run in plan.runs if run.facts["arm"] == arm and run.facts.get("recipe") == recipe]
            done = [(run, read_done(out / "runs" / run.name)) for run in runs]
            tables = [
                table_of(record["scores"], cases=run.cases["scored"], labels=labels, absent=absent)["dice"]
                for run, record in done
                if record
            ]
            row = {"arm": arm, "recipe": ", ".join(f"{key} {value}" for key, value in recipe.items()), "best": ""}
            row |= {"seeds": len(tables), "seeds_planned": len(runs), "dice": math.nan, "sd_patients": math.nan}
            if tables:
                scores = np.stack(tables)
                patients = patient_means(scores)
                row["dice"] = figure_of(scores)
                row["sd_patients"] = float(np.std(patients, ddof=1)) if len(patients) > 1 else math.nan
            of_arm.append(row)
        if all(row["seeds"] == row["seeds_planned"] for row in of_arm):
            max(of_arm, key=lambda row: row["dice"])["best"] = "best"
        rows += of_arm
    return rows


def search_markdown(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """The table of a search."""
    search = plan.study.search
    lines = [
        f"## {plan.study.name}: recipes, n = {search['n']}, scored on {plan.study.tuning} tuning patients",
        "",
        "| arm | recipe | runs | Dice | |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        dice = "" if math.isnan(row["dice"]) else f"{row['dice']:.4f}"
        spread = "" if math.isnan(row["sd_patients"]) else f" ± {row['sd_patients']:.4f}"
        runs = f"{row['seeds']} of {row['seeds_planned']}"
        lines.append(f"| {row['arm']} | {row['recipe']} | {runs} | {dice}{spread} | {row['best']} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Search from the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evidence.search", description=__doc__.partition("\n")[0])
    arguments_of(parser)
    given = parser.parse_args(arguments)

    def action() -> int:
        study = read_study(given.study)
        out = (given.out or OUT / study.name).resolve()
        prepare_folder(out, study.name)
        planner = planner_of(study, data=given.data and given.data.resolve(), out=out)
        plan = plan_of(planner, ["search"])
        print(overview(plan, out, names=given.list), flush=True)

        def report() -> str:
            rows = search_rows(plan, planner, out)
            write_text(out / "search.csv", csv_of(rows, COLUMNS))
            text = search_markdown(plan, rows)
            write_text(out / "search.md", text)
            return text

        if not given.list:
            uri = given.tracking_uri or tracking_store(out)
            open_store(uri, out=out)
            log_missing(out, outline=plan.outline, uri=uri, say=say)
            options = {"threads": given.threads, "tracking_uri": uri, "wait": not given.no_wait}
            run_plan(plan, out=out, say=say, report=report, **options)
            print(report())
        return 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return call(action)


if __name__ == "__main__":
    sys.exit(main())
