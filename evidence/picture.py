# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The few-label curve as a picture: Dice of every arm over n, each patient a dot, and the paired difference with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bundles.common.bootstrap import LEVEL

from .records import Result, stacked
from .study import CONTROL
from .table import MEAN

COLOURS = ("#c2410c", "#0f766e", "#1d4ed8", "#7e22ce", "#a16207", "#be185d")  # scratch first
WIDTH = 0.16  # of an arm, in places between two n


def curve_figure(outline: Mapping[str, Any], results: Sequence[Result], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the curve; what is not finished stays empty.

    Args:
        outline: of the study.
        results: its finished runs.
        rows: `table.curve_rows`.

    Returns:
        The figure, made without pyplot.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    dice, difference = figure.subplots(1, 2, width_ratios=(3, 2))
    sizes, arms = outline["curve"]["n"], [CONTROL, *(arm for arm in outline["arms"] if arm != CONTROL)]
    reach = [0.02]
    for number, arm in enumerate(arms):
        colour = COLOURS[number % len(COLOURS)]
        shift = WIDTH * (number - (len(arms) - 1) / 2)
        places = np.arange(len(sizes)) + shift
        of_arm = [_mean_row(rows, n, arm) for n in sizes]
        dice.plot(places, [row["mean"] for row in of_arm], "o-", color=colour, label=arm, zorder=3, markersize=5)
        for place, n in zip(places, sizes, strict=True):
            _patients(dice, results, outline, n=n, arm=arm, place=place, colour=colour)
        if arm != CONTROL:
            difference.plot(places, [row["difference"] for row in of_arm], "o", color=colour, label=arm, zorder=3)
            for place, row in zip(places, of_arm, strict=True):
                if not math.isnan(row["low"]):
                    difference.plot([place, place], [row["low"], row["high"]], color=colour, linewidth=2)
                    reach += [abs(row["low"]), abs(row["high"])]
    difference.axhline(0, color="0.5", linewidth=1)
    difference.set_ylim(-1.1 * max(reach), 1.1 * max(reach))
    difference.set_title(f"Dice, minus {CONTROL}; bar: {LEVEL:.0%} interval", fontsize=10)
    dice.set_title("Dice; dot: a patient, mean over seeds; line: mean", fontsize=10)
    for panel in (dice, difference):
        panel.set_xticks(range(len(sizes)), [f"{n}" for n in sizes])
        panel.set_xlim(-0.6, len(sizes) - 0.4)
        panel.set_xlabel("labelled patients")
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    dice.legend(fontsize=8, frameon=False, loc="best")
    figure.suptitle(outline["study"], fontsize=11)
    return figure


def _patients(
    panel: Axes,
    results: Sequence[Result],
    outline: Mapping[str, Any],
    *,
    n: int,
    arm: str,
    place: float,
    colour: str,
) -> None:
    scores, _ = stacked(results, outline["curve"], metric="dice", n=n, arms=[arm])
    if arm not in scores:
        return
    table = scores[arm][:, ~np.isnan(scores[arm]).all(axis=(0, 2))]
    patients = np.nanmean(table, axis=(0, 2)) if table.size else np.array([])
    spread = np.random.default_rng(0).uniform(-WIDTH / 3, WIDTH / 3, len(patients))
    panel.plot(place + spread, patients, ".", color=colour, alpha=0.35, markersize=4)


def _mean_row(rows: Sequence[Mapping[str, Any]], n: int, arm: str) -> Mapping[str, Any]:
    wanted = (n, arm, MEAN, "dice")
    return next(row for row in rows if (row["n"], row["arm"], row["label"], row["metric"]) == wanted)
