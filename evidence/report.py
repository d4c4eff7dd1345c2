# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Score the runs of a study that have ended, and draw its tables and pictures.

    python -m evidence.report OUT

Writes ``power.md`` and ``scores.csv``; ``curve.csv``, ``curve.md`` and ``curve.png``; for a headroom ``headroom.csv``,
``headroom.md`` and ``headroom.png``; ``carried.md`` where labels were carried; and for an ablation ``ablation.csv``,
``ablation.md`` and ``ablation.png``. Runs that have not ended leave their places empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import save_figure, write_text
from tools.bundle_runs import PLAN

from .results.carried_labels import carried_table
from .results.convergence import read_chain
from .results.figure import ablation_figure, curve_figure
from .results.headroom_figure import headroom_figure
from .results.headroom_table import headroom_markdown, headroom_rows
from .results.power_table import power_markdown
from .results.records import read_figures, read_outline, read_results
from .results.table import (
    SCORE_COLUMNS,
    ablation_markdown,
    ablation_rows,
    csv_of,
    curve_markdown,
    curve_rows,
    score_rows,
)
from .score import score_ended

SCORES = "scores.csv"


def write_report(out: Path) -> str:
    """Write the tables and pictures of a study into its folder.

    Args:
        out: folder of the study.

    Returns:
        The tables in Markdown.

    Raises:
        InputError: the folder contains no study, or a damaged file.
    """
    outline, results, figures = read_outline(out), read_results(out), read_figures(out)
    rows, of_headroom = curve_rows(outline, results), []
    if headroom := outline["headroom"]:
        chains = {n: read_chain(out, outline, n) for n in headroom["n"]} if headroom["convergence"] else {}
        of_headroom = headroom_rows(outline, results, chains)
    parts = [power_markdown(outline, rows, of_headroom), curve_markdown(outline, rows, figures)]
    write_text(out / "power.md", parts[0])
    write_text(out / SCORES, csv_of(score_rows(outline, results), SCORE_COLUMNS))
    _write(out, "curve", rows, parts[1], curve_figure(outline, results, rows))
    if headroom:
        parts.append(headroom_markdown(outline, of_headroom, chains))
        _write(out, "headroom", of_headroom, parts[-1], headroom_figure(outline, results, of_headroom, chains))
    if carried := carried_table(out):
        parts.append("# Carried labels against the true ones that were hidden\n\n" + carried)
        write_text(out / "carried.md", parts[-1])
    if outline["ablation"]:
        rows = ablation_rows(outline, results)
        parts.append(ablation_markdown(outline, rows, figures))
        _write(out, "ablation", rows, parts[-1], ablation_figure(outline, results, rows))
    return "\n".join(parts)


def _write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], text: str, figure: Figure | None = None) -> None:
    write_text(folder / f"{name}.csv", csv_of(rows))
    write_text(folder / f"{name}.md", text)
    if figure is not None:
        save_figure(figure, folder / f"{name}.png", dpi=150, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a report from the command line."""
    parser = argparse.ArgumentParser(prog="python -m evidence.report", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of a study")
    options = parser.parse_args(arguments)
    try:
        if (options.out / PLAN).is_file():
            score_ended(options.out)
        print(write_report(options.out))
    except InputError as error:
        parser.exit(1, f"Stopped: {error}\n")
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
