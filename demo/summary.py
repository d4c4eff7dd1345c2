# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Summary of the demo on the screen: scores of the three fine-tunings, paths of the results, time spent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .findings import (
    compare,
    learnt_sentence,
    missed_organs,
    missed_sentences,
    organs_of_patients,
    patients,
    read_rows,
    read_validation,
    start_sentence,
)
from .stage import RECORDS

# Folder of each fine-tuning, and its name in tables.
RUNS = {
    "swin_unetr_btcv_seg": "from encoder",
    "from_scratch": "from scratch",
    "shuffled_labels": "shuffled labels",
}


def read_scores(out: Path) -> dict[str, dict[str, Any]]:
    """Return ``evaluation/summary.json`` of each fine-tuning, by folder; see `score_summary.summarise`."""
    return {run: json.loads((out / run / "evaluation" / "summary.json").read_text()) for run in RUNS}


def read_stages(out: Path) -> list[dict[str, Any]]:
    """Return the records of the finished stages (title, seconds, key with the command), in order of completion.

    The report stage is excluded, because the report shows this list.
    """
    paths = [path for path in (out / RECORDS).glob("[!.]*.json") if path.name != "report.json"]
    records = [json.loads(path.read_text()) for path in paths]
    return sorted((record for record in records if "finished" in record), key=lambda record: record["finished"])


def mlflow_command(out: Path) -> str:
    """Return the command that shows the tracked runs in a browser, after that of the page if it is not installed."""
    install = "" if find_spec("flask") else "make install EXTRAS=mlflow && "
    return f"{install}mlflow ui --backend-store-uri sqlite:///{(out / 'mlruns.db').resolve().as_posix()}"


def clock(seconds: float) -> str:
    """Return seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def score_text(value: float | None) -> str:
    """Return a score with three digits, or a dash if neither reference nor prediction contains the organ."""
    return "–" if value is None else f"{value:.3f}"


def tolerance_text(summary: dict[str, Any]) -> str:
    """Return the NSD tolerance of an evaluation as text, such as ``4 mm``."""
    values = sorted(set(summary["tolerance"].values()))
    return " to ".join(f"{value:g}" for value in (values if len(values) == 1 else (values[0], values[-1]))) + " mm"


def print_summary(out: Path, console: Console) -> None:
    """Print the scores, the paths of the results and the time spent.

    Args:
        out: folder of a finished demo.
        console: where to print.
    """
    scores = read_scores(out)
    first = next(iter(scores.values()))
    title = f"Scores on {patients(len(first['cases']))} that training has not seen, all synthetic"
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("\n\norgan", no_wrap=True)
    for run in RUNS.values():
        table.add_column(run.replace(" ", "\n") + "\nDice", justify="right")
        table.add_column("\n\nNSD", justify="right")
    for organ in first["labels"]:
        means = [summary["labels"][organ][metric]["mean"] for summary in scores.values() for metric in ("dice", "nsd")]
        table.add_row(organ.replace("_", " "), *map(score_text, means))
    table.add_section()
    means = [summary[metric] for summary in scores.values() for metric in ("mean_dice", "mean_nsd")]
    table.add_row("mean", *map(score_text, means), style="bold")
    console.print()
    console.print(table)
    console.print(
        f"\nNSD: share of the surface within {tolerance_text(first)}. The patients are synthetic: this shows that "
        "every part works, not that pre-training helps on real scans.\n"
    )
    for sentence in _sentences(out):
        console.print(sentence, highlight=False)
    console.print()
    _print_lines(
        console,
        {
            "report": out / "report.html",
            "encoder": out / "swin_unetr_pretrain" / "models" / "encoder.pt",
            "network": out / "swin_unetr_btcv_seg" / "models" / "model.pt",
            "segmentation": out / "segmentation",
            "tracked runs": mlflow_command(out),
            "compute time": clock(sum(stage["seconds"] for stage in read_stages(out))),
        }.items(),
    )


def _sentences(out: Path) -> list[str]:
    """Return what the demo may claim."""
    finetuned, scratch = (read_rows(out, run) for run in list(RUNS)[:2])
    labelled = json.loads((out / "data/labelled/dataset.json").read_text())
    missed = missed_sentences(missed_organs(finetuned, organs_of_patients(out, labelled)))
    return [
        learnt_sentence(read_validation(out)),
        start_sentence(compare(finetuned, scratch)),
        f"Missed, {'; '.join(missed)}." if missed else "Every organ was found in every patient.",
    ]


def _print_lines(console: Console, lines: Iterable[tuple[str, Any]]) -> None:
    for name, value in lines:
        # Users copy paths and commands: do not wrap them or interpret markup.
        console.print(Text(f"{name:<13} {value}"), soft_wrap=True)
