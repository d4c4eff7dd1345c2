# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Summarise the scores of many cases: mean, spread and bootstrap interval for each organ and overall."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...common.words import counted
from .bootstrap import LEVEL, mean_interval

METRICS = ("dice", "nsd", "hd95")
STATISTICS = {"mean": np.mean, "std": np.std, "median": np.median}


def summarise(rows: Iterable[Mapping[str, Any]], *, organs: Iterable[str]) -> dict[str, Any]:
    """Summarise the scores of the cases for each organ and over all organs. NaN is ignored.

    Args:
        rows: dictionaries with the keys ``case``, ``label`` and those of `METRICS`, one per case and organ.
        organs: the organ names.

    Returns:
        ``{"labels": {organ: {"dice": {...}, "nsd": {...}, "hd95": {...}}}, "mean_dice", "mean_nsd", "mean_hd95",
        "intervals": {"mean_dice", "mean_nsd", "mean_hd95"}}``. For each organ and metric: ``mean``, ``std`` (divisor
        n), ``median``, ``n``, and ``interval``, the 95% bootstrap interval of the mean. For HD95 also ``missed``, the
        number of cases without a value because only one mask has the organ. The ``mean_...`` are the means over organs
        of the organs' means, with their intervals (see `mean_interval`). The mean of no cases is NaN; the interval of
        fewer than two cases is None.
    """
    rows, organs = list(rows), list(organs)
    places = {case: place for place, case in enumerate(dict.fromkeys(row["case"] for row in rows))}
    tables = {metric: np.full((len(places), len(organs)), math.nan) for metric in METRICS}
    for row in rows:
        if row["label"] in organs:
            for metric, table in tables.items():
                table[places[row["case"]], organs.index(row["label"])] = row[metric]

    per_organ = {
        organ: {metric: _moments(table[:, column]) for metric, table in tables.items()}
        for column, organ in enumerate(organs)
    }
    for moments in per_organ.values():
        moments["hd95"]["missed"] = moments["dice"]["n"] - moments["hd95"]["n"]
    means = {metric: [moments[metric]["mean"] for moments in per_organ.values()] for metric in METRICS}
    overall = {f"mean_{metric}": _moments(np.array(of_organs))["mean"] for metric, of_organs in means.items()}
    return {
        "labels": per_organ,
        **overall,
        "intervals": {f"mean_{metric}": _interval(table) for metric, table in tables.items()},
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """Return the summary of an evaluation as a plain-text table for the log.

    Args:
        summary: the result of `summarise`, plus ``cases`` and ``tolerance`` (mm for each organ).
    """
    organs = summary["labels"]
    width = max(len("organ"), *(len(organ) for organ in organs))
    lines = [
        f"Scores of {counted(len(summary['cases']), 'case')} (mean and standard deviation over n cases; {LEVEL:.0%} bootstrap "
        "interval of the mean Dice; NSD tolerance and HD95 in mm):",
        f"{'organ':<{width}}  {'Dice':>6}  {'std':>6}  {'n':>4}  {'interval':<16}  {'NSD':>6}  {'std':>6}  {'tol.':>5}"
        f"  {'HD95':>6}  {'std':>6}  {'missed':>6}",
    ]
    for organ, moments in organs.items():
        dice, nsd, hd95 = (moments[metric] for metric in METRICS)
        lines.append(
            f"{organ:<{width}}  {dice['mean']:6.4f}  {dice['std']:6.4f}  {dice['n']:4d}  {_brackets(dice['interval'])}"
            f"  {nsd['mean']:6.4f}  {nsd['std']:6.4f}  {summary['tolerance'][organ]:5.2f}"
            f"  {hd95['mean']:6.2f}  {hd95['std']:6.2f}  {hd95['missed']:6d}"
        )
    interval = _brackets(summary["intervals"]["mean_dice"])
    lines.append(
        f"{'mean':<{width}}  {summary['mean_dice']:6.4f}  {'':6}  {'':4}  {interval}"
        f"  {summary['mean_nsd']:6.4f}  {'':6}  {'':5}  {summary['mean_hd95']:6.2f}"
    )
    lines.append(
        "A case in which neither mask has the organ is not counted in n. If only one mask has it, the case counts"
    )
    lines.append("with Dice 0 and NSD 0, and has no HD95 (missed).")
    return "\n".join(lines)


def _moments(values: np.ndarray) -> dict[str, Any]:
    present = values[~np.isnan(values)]
    moments = {name: float(f(present)) if len(present) else math.nan for name, f in STATISTICS.items()}
    return {**moments, "n": len(present), "interval": _interval(present)}


def _interval(scores: np.ndarray) -> list[float] | None:
    interval = mean_interval(scores)
    return None if interval is None else list(interval)


def _brackets(interval: Sequence[float] | None) -> str:
    return f"{'-':<16}" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"
