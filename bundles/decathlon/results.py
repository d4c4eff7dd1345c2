# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write many evaluations as one table: CSV, Markdown and figure."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..common.errors import InputError
from ..common.files import atomic_path, save_figure, write_text
from ..segmentation.results.bootstrap import LEVEL
from .evaluations import ARMS, Evaluation, check_together, doubts_of, find_evaluations, fold_of, read_evaluation
from .results_figure import results_figure
from .results_table import ALL_TASKS, COLUMNS, DIFFERENCES, MEAN, PAPER, results_table

logger = logging.getLogger(__name__)


def gather(
    *,
    evaluations: str | Sequence[str],
    output_dir: str,
    tasks_file: str,
    published: Mapping[str, Mapping[str, float]],
    arms: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Write the table of all evaluations as ``results.csv``, ``results.md`` and ``results.png``.

    Args:
        evaluations: see `find_evaluations`.
        output_dir: output folder.
        tasks_file: ``configs/tasks.yaml``. Its tasks and labels have rows even if they were not evaluated, unless all
            evaluations are of other tasks.
        published: scores of the paper: maps a task (or `ALL_TASKS`) to the values of `PAPER`.
        arms: maps folders to arms, for evaluations whose models do not record their arm; see `read_evaluation`.

    Returns:
        The rows of the table, see `results_table`.

    Raises:
        InputError: see `find_evaluations`, `read_evaluation` and `check_together`; also if ``arms`` names a folder that
            is not one of the evaluations.
    """
    folders = find_evaluations(evaluations)
    stated = {os.path.realpath(folder): arm for folder, arm in (arms or {}).items()}
    if unknown := [folder for folder in arms or {} if os.path.realpath(folder) not in map(os.path.realpath, folders)]:
        raise InputError(f"--arms names {', '.join(unknown)}, not one of the evaluations: {', '.join(folders)}.")
    loaded = [read_evaluation(folder, arm=stated.get(os.path.realpath(folder))) for folder in folders]
    check_together(loaded)
    table = ConfigParser.load_config_file(tasks_file)
    labels = {task: [name for value, name in row["labels"].items() if int(value)] for task, row in table.items()}
    if not any(evaluation.task in labels for evaluation in loaded):
        labels, published = {}, {}
    rows = results_table(loaded, labels=labels, published=published)
    doubts = [doubt for evaluation in loaded for doubt in doubts_of(evaluation)]
    for doubt in doubts:
        logger.warning("%s", doubt)

    folder = Path(output_dir)
    with atomic_path(folder / "results.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _csv_field(value) for name, value in row.items()} for row in rows)
    write_text(folder / "results.md", _markdown(rows, loaded, doubts))
    save_figure(results_figure(rows), folder / "results.png")
    tasks = {evaluation.task for evaluation in loaded}
    logger.info("%d evaluations of %d tasks: wrote %s", len(loaded), len(tasks), folder / "results.md")
    return rows


def _csv_field(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return value


def _number(value: float, form: str = ".4f") -> str:
    return "" if math.isnan(value) else format(value, form)


def _markdown(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation], doubts: Sequence[str]) -> str:
    heads = ["task", "label", "cases", "Dice pre-trained", "Dice scratch", f"difference [{LEVEL:.0%}], pairs"]
    heads += ["NSD pre-trained", "NSD scratch", f"difference [{LEVEL:.0%}]", "HD95 pre-trained", "HD95 scratch"]
    heads += ["paper: Dice pre-trained", "paper: Dice scratch", "paper: NSD pre-trained"]
    lines = ["# Results", "", "| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        counts = [_number(row[f"{arm}_n"], ".0f") for arm in ARMS]
        count = counts[0] if counts[0] == counts[1] else " / ".join(count or "-" for count in counts)
        unit = " tasks" if row["task"] == ALL_TASKS and count else ""
        fields = [row["task"], row["label"], count + unit]
        for metric in DIFFERENCES:
            fields += [_number(row[f"{arm}_{metric}"]) for arm in ARMS]
            fields += [_difference_text(row, metric, with_pairs=metric == "dice")]
        fields += [_hd95_text(row, arm) for arm in ARMS]
        fields += [_number(row[name]) for name in PAPER]
        bold = "**" if row["label"] == MEAN else ""
        lines.append("| " + " | ".join(f"{bold}{field}{bold}" if field else "" for field in fields) + " |")
    return "\n".join([*lines, "", *_notes(doubts), "", *_sources(evaluations), ""])


def _difference_text(row: Mapping[str, Any], metric: str, *, with_pairs: bool) -> str:
    difference, low, high = (row[f"difference_{metric}{end}"] for end in ("", "_low", "_high"))
    if math.isnan(difference):
        return ""
    interval = "" if math.isnan(low) else f" [{low:+.4f}, {high:+.4f}]"
    return f"{difference:+.4f}{interval}" + (f", {row['difference_n']:.0f}" if with_pairs else "")


def _hd95_text(row: Mapping[str, Any], arm: str) -> str:
    missed = row[f"{arm}_hd95_missed"]
    return _number(row[f"{arm}_hd95"], ".2f") + (f" ({missed:.0f} missed)" if missed > 0 else "")


def _notes(doubts: Sequence[str]) -> list[str]:
    return [
        "Dice and NSD are between 0 and 1, HD95 is in mm. The score of a label is the mean over the cases of all "
        "folds, that of a task the mean over its labels, and that of the last row the mean over the evaluated tasks. "
        "Cases are counted if either mask contains the label. `a / b` means that the counts of pre-trained and scratch "
        "differ: their means are then over different cases or tasks, and only the difference compares them.",
        "",
        "Difference: pre-trained minus scratch over the cases that both scored (pairs), with the "
        f"{LEVEL:.0%} bootstrap interval over cases.",
        "",
        "HD95 excludes cases in which only one mask contains the label (missed).",
        "",
        "paper: as reported by Tang et al., CVPR 2022. The values for all ten tasks are on the challenge's hidden test "
        "set; compare them only with a score of its leaderboard. The values for single tasks are from the paper's "
        "comparison with training from scratch.",
        *(f"\n**Caution:** {doubt}" for doubt in doubts),
    ]


def _sources(evaluations: Sequence[Evaluation]) -> list[str]:
    lines = [
        "| evaluation | task | arm | section | fold | cases | weights at the start |",
        "|---|---|---|---|---|---:|---|",
    ]
    for one in sorted(evaluations, key=lambda one: (one.task, one.arm, str(fold_of(one)), one.folder)):
        fold = "default" if fold_of(one) is None else fold_of(one)
        start = ", ".join(sorted({str(model["start_file"] or model["start"]) for model in one.evaluated["models"]}))
        count = len({row["case"] for row in one.rows})
        lines.append(
            f"| {one.folder} | {one.task} | {one.arm} | {one.evaluated['section']} | {fold} | {count} | {start} |"
        )
    return lines
