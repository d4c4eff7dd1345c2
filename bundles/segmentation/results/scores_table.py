# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write and read ``scores.csv``, the table of scores that ``evaluate.yaml`` writes."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ...common.files import atomic_path
from .score_summary import METRICS


def write_scores(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Write the scores of an evaluation with six decimals. The file is written atomically.

    Args:
        rows: ``case``, ``label`` and the `METRICS` of each case and label; NaN for a missing score.
        path: ``scores.csv``.
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["case", "label", *METRICS], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, **{m: "" if math.isnan(row[m]) else f"{row[m]:.6f}" for m in METRICS}})


def read_scores(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the scores of an evaluation.

    Args:
        path: ``scores.csv``: ``case,label,dice,nsd,hd95``, one row per case and label, an empty field for a missing
            score.

    Returns:
        One dictionary per row: ``case`` and ``label`` as text, and the `METRICS` as float, NaN for an empty field.

    Raises:
        FileNotFoundError: the file does not exist.
        KeyError: a column is missing.
        ValueError: a score is not a number, a row is cut short, or the file is not UTF-8 text.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cut = next(
        (number for number, row in enumerate(rows, 2) if any(row.get(name, "") is None for name in METRICS)), None
    )
    if cut is not None:
        raise ValueError(f"line {cut} is cut short")
    return [
        {"case": row["case"], "label": row["label"]} | {metric: float(row[metric] or math.nan) for metric in METRICS}
        for row in rows
    ]
