# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The first table of a report: could a study of this size distinguish any pre-training from no pre-training?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..study.study import CONTROL
from .headroom_table import headroom_of
from .power import ALPHA, MOST_SEEDS, POWER, pooled_sd, sd_interval, seeds_needed, smallest_difference
from .table import main_label, row_of

POINTS = (0.01, 0.02, 0.05)  # differences in Dice for which the seeds are counted

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Size:
    """What a study can show at one n; NaN where it is not known yet.

    Attributes:
        n: number of labelled patients.
        seeds: seeds of the study.
        headroom: ceiling minus scratch.
        sd: standard deviation of the seeds' differences, over all arms with at least two finished seeds.
        smallest: smallest difference that the seeds of the study show.
        smallest_range: the same at the two ends of the interval of ``sd``.
        by_patients: smallest difference that the scored patients show, however many seeds there are.
        needed: seeds for each of `POINTS`; None if ``sd`` is not known.
    """

    n: int
    seeds: int
    headroom: float
    sd: float
    smallest: float
    smallest_range: tuple[float, float]
    by_patients: float
    needed: tuple[int, ...] | None


def size_of(outline: Mapping[str, Any], rows: Rows, headroom: Rows, n: int) -> Size:
    """Compute what the study can show at one n.

    Args:
        outline: outline of the study.
        rows: `table.curve_rows`.
        headroom: `headroom_table.headroom_rows`, or nothing.
        n: number of labelled patients.
    """
    seeds = len(outline["curve"]["seeds"])
    arms = [row_of(rows, n, arm, main_label(outline), "dice") for arm in outline["arms"] if arm != CONTROL]
    sd, freedom = pooled_sd([list(row["by_seed"].values()) for row in arms])
    known = not math.isnan(sd)
    squares = [row["sd_differences"] ** 2 for row in arms if not math.isnan(row["sd_differences"])]
    of_patients = math.sqrt(sum(squares) / len(squares)) if squares else math.nan
    patients = max((row["patients"] for row in arms if not math.isnan(row["patients"])), default=0)
    ends = sd_interval(sd, freedom) if known else (math.nan, math.nan)
    return Size(
        n=n,
        seeds=seeds,
        headroom=headroom_of(outline, headroom, n),
        sd=sd,
        smallest=smallest_difference(sd=sd, number=seeds),
        smallest_range=tuple(smallest_difference(sd=end, number=seeds) for end in ends),
        by_patients=smallest_difference(sd=of_patients, number=int(patients)),
        needed=tuple(seeds_needed(points, sd=sd) for points in POINTS) if known else None,
    )


def power_markdown(outline: Mapping[str, Any], rows: Rows, headroom: Rows) -> str:
    """Return what the study can show in Markdown: one sentence and one table row for each n.

    Args:
        outline: outline of the study.
        rows: `table.curve_rows`.
        headroom: `headroom_table.headroom_rows`, or nothing.
    """
    sizes = [size_of(outline, rows, headroom, n) for n in outline["curve"]["n"]]
    seeds = len(outline["curve"]["seeds"])
    columns = ("headroom", "SD between seeds", f"smallest difference shown by {seeds} seeds", "by the patients")
    needed = [f"seeds for {100 * points:g} point{'s' * (points > 0.01)}" for points in POINTS]
    lines = [f"## {outline['study']}: what this study can show", ""]
    lines += [f"- n = {size.n}: {size_text(size)}" for size in sizes]
    lines += ["", f"| n | {' | '.join([*columns, *needed])} |", "|---|" + "---|" * (len(columns) + len(needed))]
    for size in sizes:
        low, high = size.smallest_range
        spread = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
        cells = [
            _number(size.headroom),
            _number(size.sd, 4),
            _number(size.smallest) + spread,
            _number(size.by_patients),
        ]
        cells += [_count(each) for each in size.needed] if size.needed else [""] * len(POINTS)
        lines.append(f"| {size.n} | {' | '.join(cells)} |")
    lines += [
        "",
        f"In Dice of the first figure. A difference is shown if the two-sided paired t-test over seeds at {ALPHA:.0%} "
        f"finds it with a probability of {POWER:.0%}. SD: of the differences between an arm and scratch with the same "
        "seed, over all arms; in brackets, the smallest difference at both ends of its own 95% interval. By the "
        "patients: the same test over the scored patients, a limit that more seeds do not lower. Headroom: scratch with "
        "all labels minus scratch.",
    ]
    return "\n".join([*lines, ""])


def size_text(size: Size) -> str:
    """State in words whether any pre-training could be distinguished from no pre-training."""
    if size.seeds < 2:
        return "one seed has no spread: this study cannot tell a pre-training from luck, whatever it measures."
    if size.needed is None:
        return "unknown until two seeds of scratch and of another arm are finished."
    shown = f"{size.seeds} seeds show a difference of {size.smallest:.3f} or more"
    if math.isnan(size.headroom):
        return f"{shown}. The headroom is not measured: whether any pre-training can gain that much is open."
    if size.headroom <= size.smallest:
        return (
            f"no pre-training can be told from none at this size, unless it beats training with all labels: {shown}, but "
            f"all labels instead of {size.n} change scratch by {size.headroom:+.3f}."
        )
    return f"{shown}, which is {size.smallest / size.headroom:.0%} of the headroom of {size.headroom:.3f}."


def _number(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _count(seeds: int) -> str:
    return f"{MOST_SEEDS} or more" if seeds >= MOST_SEEDS else str(seeds)
