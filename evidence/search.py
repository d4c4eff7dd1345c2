# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Search for recipes, the same number for every arm, scored on patients that the study never scores.

    python -m evidence.search openkbp --data DIR --out OUT

The recipes are scored on the tuning patients, which are in no labelled subset and not in the validation part. The
results are written to ``search.csv`` and ``search.md``. Enter the best recipe of each arm into the study file by hand.
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

from .results.mlflow_store import log_missing, log_report, open_store, tracking_store
from .results.paired_bootstrap import figure_of, patient_means
from .results.records import read_done, table_of
from .results.table import csv_of
from .run import OUT, arguments_of, call, plan_of, processes_of, run_plan, say
from .runs.plan import Plan, Planner
from .runs.planning import planner_of
from .runs.progress import overview
from .study.reading import read_study
from .study.study_data import prepare_folder

COLUMNS = ("arm", "recipe", "seeds", "seeds_planned", "dice", "sd_patients", "best")


def search_rows(plan: Plan, planner: Planner, out: Path) -> list[dict[str, Any]]:
    """Return one row for each arm and recipe.

    ``dice`` is the mean over seeds and tuning patients, then over the labels of the first figure; NaN if no run is finished. ``best`` marks the
    highest Dice of an arm once all its recipes are finished.

    Args:
        plan: plan of the search.
        planner: planner of the study.
        out: folder of the study.
    """
    labels, absent = plan.outline["labels"], plan.outline["absent"]
    rows = []
    for arm in planner.study.arms:
        arm_rows = []
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
                scores = np.stack(tables)[:, :, [labels.index(name) for name in planner.first_figure]]
                patients = patient_means(scores)
                row["dice"] = figure_of(scores)
                row["sd_patients"] = float(np.std(patients, ddof=1)) if len(patients) > 1 else math.nan
            arm_rows.append(row)
        if all(row["seeds"] == row["seeds_planned"] for row in arm_rows):
            max(arm_rows, key=lambda row: row["dice"])["best"] = "best"
        rows += arm_rows
    return rows


def search_markdown(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of a search in Markdown."""
    search = plan.study.search
    lines = [
        f"## {plan.study.name}: recipes, n = {search.n}, scored on {plan.study.tuning} tuning patients",
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
    """Search from the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evidence.search", description=__doc__.partition("\n")[0])
    arguments_of(parser)
    options = parser.parse_args(arguments)

    def action() -> int:
        study = read_study(options.study)
        out = (options.out or OUT / study.name).resolve()
        prepare_folder(out, study.name)
        planner = planner_of(study, data=options.data and options.data.resolve(), out=out)
        plan = plan_of(planner, ["search"])
        print(overview(plan, out, names=options.list, processes=processes_of(options.threads)), flush=True)

        def report() -> str:
            rows = search_rows(plan, planner, out)
            write_text(out / "search.csv", csv_of(rows, COLUMNS))
            text = search_markdown(plan, rows)
            write_text(out / "search.md", text)
            return text

        if not options.list:
            uri = options.tracking_uri or tracking_store(out)
            open_store(uri, out=out)
            log_missing(out, outline=plan.outline, uri=uri, say=say)
            run_plan(
                plan,
                out=out,
                threads=options.threads,
                tracking_uri=uri,
                say=say,
                report=report,
                wait=not options.no_wait,
            )
            print(report())
            log_report(out, study=study.name, uri=uri, say=say)
        return 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return call(action)


if __name__ == "__main__":
    sys.exit(main())
