# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Draw the tables and the pictures of a study again: from its folder, or from MLflow alone.

    python -m evidence.report OUT
    python -m evidence.report OUT --tracking_uri sqlite:////runs/openkbp/mlruns.db --study openkbp

They are ``curve.csv``, ``curve.md`` and ``curve.png``, and of an ablation ``ablation.csv``, ``ablation.md`` and
``ablation.png``. Runs that are not finished leave their places empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bundles.common.errors import InputError
from bundles.common.files import atomic_path, write_text

from .results.figure import ablation_figure, curve_figure
from .results.records import Result, read_figures, read_outline, read_results
from .results.table import ablation_markdown, ablation_rows, csv_of, curve_markdown, curve_rows


def write_report(out: Path) -> str:
    """Write the report of a study's folder into it, and return its tables."""
    return draw(read_outline(out), read_results(out), read_figures(out), out)


def draw(
    outline: Mapping[str, Any],
    results: Sequence[Result],
    figures: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> str:
    """Write tables and pictures of these results, and return the tables as Markdown.

    Args:
        outline: what the study is about (`plan.Planner.outline`).
        results: the finished fine-tunings, from wherever.
        figures: of the finished pre-trainings by name.
        folder: gets the files.
    """
    rows = curve_rows(outline, results)
    text = curve_markdown(outline, rows, figures)
    _write(folder, "curve", rows, text, curve_figure(outline, results, rows))
    if outline["ablation"]:
        rows = ablation_rows(outline, results)
        table = ablation_markdown(outline, rows, figures)
        _write(folder, "ablation", rows, table, ablation_figure(outline, results, rows))
        text += "\n" + table
    return text


def _write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], text: str, figure: Figure) -> None:
    write_text(folder / f"{name}.csv", csv_of(rows))
    write_text(folder / f"{name}.md", text)
    with atomic_path(folder / f"{name}.png") as path:
        figure.savefig(path, dpi=150, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a report from the command line."""
    parser = argparse.ArgumentParser(prog="python -m evidence.report", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of a study; with --tracking_uri any folder for the report")
    parser.add_argument("--tracking_uri", help="draw from this store of MLflow alone")
    parser.add_argument("--study", help="with --tracking_uri: name of the study")
    parser.add_argument(
        "--experiment", help="with --tracking_uri: where several folders' studies of that name are in it"
    )
    given = parser.parse_args(arguments)
    if bool(given.tracking_uri) != bool(given.study):
        parser.error("--tracking_uri and --study go together")
    if given.experiment and not given.tracking_uri:
        parser.error("--experiment is of --tracking_uri")
    try:
        if given.tracking_uri:
            from .results.mlflow_store import read_store

            print(draw(*read_store(given.tracking_uri, study=given.study, experiment=given.experiment), given.out))
        else:
            print(write_report(given.out))
    except InputError as error:
        parser.exit(1, f"Stopped: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
