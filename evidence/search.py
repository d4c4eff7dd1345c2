# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write the table of a search: recipes, the same number for every arm, scored on patients that the study never scores.

    python -m evidence.search --out OUT

The recipes are scored on the tuning patients, which are in no labelled subset and not in the validation part. The
results are written to ``search.csv`` and ``search.md``. Enter the best recipe of each arm into the study file by hand.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import write_text
from tools.bundle_runs import read_plan

from .results.paired_bootstrap import figure_of, patient_means
from .results.records import read_done, read_outline, table_of
from .results.table import csv_of
from .score import score_ended

COLUMNS = ("arm", "recipe", "seeds", "seeds_planned", "dice", "sd_patients", "best")


def search_rows(plan: Mapping[str, Any], outline: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """Return one row for each arm and recipe.

    ``dice`` is the mean over seeds and tuning patients, then over the labels of the first figure; NaN if no run is
    finished. ``best`` marks the highest Dice of an arm once all its recipes are finished.

    Args:
        plan: content of ``plan.json`` of a study with a search.
        outline: its outline.
        out: folder of the study.
    """
    labels, absent = outline["labels"], outline["absent"]
    columns = [labels.index(name) for name in outline["first_figure"]]
    rows = []
    for arm, recipes in _recipes(plan).items():
        arm_rows = []
        for recipe, runs in recipes:
            tables = []
            for name in runs:
                if done := read_done(out / "runs" / name):
                    cases = plan["runs"][name]["settings"]["cases"]["scored"]
                    tables.append(table_of(done["scores"], cases=cases, labels=labels, absent=absent)["dice"])
            row = {"arm": arm, "recipe": ", ".join(f"{key} {value}" for key, value in recipe.items()), "best": ""}
            row |= {"seeds": len(tables), "seeds_planned": len(runs), "dice": math.nan, "sd_patients": math.nan}
            if tables:
                scores = np.stack(tables)[:, :, columns]
                patients = patient_means(scores)
                row["dice"] = figure_of(scores)
                row["sd_patients"] = float(np.std(patients, ddof=1)) if len(patients) > 1 else math.nan
            arm_rows.append(row)
        if all(row["seeds"] == row["seeds_planned"] for row in arm_rows):
            max(arm_rows, key=lambda row: row["dice"])["best"] = "best"
        rows += arm_rows
    return rows


def search_markdown(plan: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of a search in Markdown."""
    facts = [plan["runs"][name]["settings"] for name in plan["parts"]["search"]]
    scored = next(each for each in facts if each["kind"] == "finetuning")
    lines = [
        f"## {plan['name']}: recipes, n = {scored['facts']['n']}, scored on {len(scored['cases']['scored'])} tuning "
        "patients",
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


def write_search(out: Path) -> str:
    """Write ``search.csv`` and ``search.md`` into the folder of a study, and return the latter.

    Raises:
        InputError: the folder contains no planned study, or a damaged file.
    """
    score_ended(out)
    plan = read_plan(out)
    rows = search_rows(plan, read_outline(out), out)
    text = search_markdown(plan, rows)
    write_text(out / "search.csv", csv_of(rows, COLUMNS))
    write_text(out / "search.md", text)
    return text


def _recipes(plan: Mapping[str, Any]) -> dict[str, list[tuple[dict[str, Any], list[str]]]]:
    """Map each arm to its recipes, each with the names of its runs, in the order of the study."""
    found: dict[str, list[tuple[dict[str, Any], list[str]]]] = {}
    for name in plan["parts"]["search"]:
        facts = plan["runs"][name]["settings"]["facts"]
        if "recipe" not in facts:
            continue
        recipes = found.setdefault(facts["arm"], [])
        runs = next((runs for recipe, runs in recipes if recipe == facts["recipe"]), None)
        if runs is None:
            recipes.append((facts["recipe"], runs := []))
        runs.append(name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table from the command line."""
    parser = argparse.ArgumentParser(prog="python -m evidence.search", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    options = parser.parse_args(arguments)
    try:
        print(write_search(options.out))
    except InputError as error:
        parser.exit(1, f"Stopped: {error}\n")
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
