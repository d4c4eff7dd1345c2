# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Figures of a study: Dice of every arm with a dot for each patient, and the paired difference with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bundles.segmentation.results.bootstrap import LEVEL

from ..study.study import CONTROL
from .paired_bootstrap import patient_means
from .records import Result, stacked
from .table import FIRST, main_label, row_of

COLOURS = ("#c2410c", "#0f766e", "#1d4ed8", "#7e22ce", "#a16207", "#be185d")  # the first is for scratch
WIDTH = 0.16  # width of an arm, in ticks of the x axis
LEAST_REACH = 0.02  # least limit of the axis of differences, so that noise does not look large

Rows = Sequence[Mapping[str, Any]]


def curve_figure(outline: Mapping[str, Any], results: Sequence[Result], rows: Rows) -> Figure:
    """Draw the few-label curve, with the arms side by side at each n. What is not finished stays empty.

    Args:
        outline: outline of the study.
        results: its finished runs.
        rows: `table.curve_rows`.

    Returns:
        The figure, made without pyplot.
    """
    curve = outline["curve"]
    arms = [CONTROL, *(arm for arm in outline["arms"] if arm != CONTROL)]
    columns = [outline["labels"].index(name) for name in outline["first_figure"]]
    label = main_label(outline)
    what = f"{outline['study']}: mean of {', '.join(outline['first_figure'])}" if label == FIRST else outline["study"]
    figure, panels = empty_figure(what, [str(n) for n in curve["n"]], ends="line: mean", ratios=(3, 2))
    for number, arm in enumerate(arms):
        shift = WIDTH * (number - (len(arms) - 1) / 2)
        places = {n: place + shift for place, n in enumerate(curve["n"])}
        colour = COLOURS[number % len(COLOURS)]
        draw_arm(panels, curve, results, rows, arm=arm, places=places, colour=colour, label=label, columns=columns)
    for panel in panels:
        panel.set_xlabel("labelled patients")
    panels[0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def ablation_figure(outline: Mapping[str, Any], results: Sequence[Result], rows: Rows) -> Figure:
    """Draw the ablation, with the subsets of the proxy tasks side by side. What is not finished stays empty.

    Args:
        outline: outline of a study with an ablation.
        results: its finished runs.
        rows: `table.ablation_rows`.

    Returns:
        The figure, made without pyplot.
    """
    ablation, label = outline["ablation"], main_label(outline)
    columns = [outline["labels"].index(name) for name in outline["first_figure"]]
    title = f"{outline['study']}: proxy tasks, {ablation['n']} labelled patients"
    names = ["\n".join(each["tasks"]) or CONTROL for each in ablation["rows"]]
    figure, panels = empty_figure(title, names, ends="circle: mean", ratios=(1, 1))
    for place, each in enumerate(ablation["rows"]):
        colour = COLOURS[0 if each["arm"] == CONTROL else 1]
        places = {ablation["n"]: place}
        draw_arm(
            panels, ablation, results, rows, arm=each["arm"], places=places, colour=colour, label=label, columns=columns
        )
    for panel in panels:
        panel.tick_params(axis="x", labelsize=6)
    return figure


def empty_figure(
    title: str, ticks: Sequence[str], *, ends: str, ratios: Sequence[int]
) -> tuple[Figure, tuple[Axes, ...]]:
    """Return a figure with a panel for Dice and one for differences, and more panels to the right of them.

    Args:
        title: the figure's title.
        ticks: ticks of the x axis of both panels, from 0 on.
        ends: what marks the mean in the first panel.
        ratios: widths of the panels, two or more.
    """
    figure = Figure(figsize=(10 + 5 * (len(ratios) - 2), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = tuple(figure.subplots(1, len(ratios), width_ratios=ratios))
    dice, difference = panels[:2]
    dice.set_title(f"Dice; dot: a patient, mean over seeds; {ends}", fontsize=10)
    difference.set_title(f"Dice, minus {CONTROL}; {LEVEL:.0%}: bar, bootstrap; line, t over seeds", fontsize=10)
    difference.axhline(0, color="0.5", linewidth=1)
    difference.set_ylim(-1.1 * LEAST_REACH, 1.1 * LEAST_REACH)
    for panel in (dice, difference):
        panel.set_xticks(range(len(ticks)), ticks)
        panel.set_xlim(-0.6, len(ticks) - 0.4)
    for panel in panels:
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure, panels


def draw_arm(
    panels: tuple[Axes, Axes],
    part: Mapping[str, Any],
    results: Sequence[Result],
    rows: Rows,
    *,
    arm: str,
    places: Mapping[int, float],
    colour: str,
    label: str,
    columns: Sequence[int],
) -> None:
    """Draw one arm into the panels of Dice and of differences.

    Args:
        panels: the two panels.
        part: part of the outline, with ``seeds``.
        results: finished runs.
        rows: rows of the table of this part.
        arm: the arm's name.
        places: n to its place on the x axis.
        colour: the arm's colour.
        label: label of the rows.
        columns: indices of the labels that a patient's dot is the mean of.
    """
    dice, difference = panels
    arm_rows = [row_of(rows, n, arm, label, "dice") for n in places]
    at = list(places.values())
    dice.plot(at, [row["mean"] for row in arm_rows], "o-", color=colour, label=arm, zorder=3, markersize=5)
    for n, place in places.items():
        scores, _ = stacked(results, part, metric="dice", n=n, arms=[arm])
        patients = patient_means(scores[arm][:, :, list(columns)]) if arm in scores else np.array([])
        spread = np.random.default_rng(0).uniform(-WIDTH / 3, WIDTH / 3, len(patients))
        dice.plot(place + spread, patients, ".", color=colour, alpha=0.35, markersize=4)
    if arm == CONTROL:
        return
    difference.plot(at, [row["difference"] for row in arm_rows], "o", color=colour, label=arm, zorder=3)
    for place, row in zip(at, arm_rows, strict=True):
        if not math.isnan(row["low"]):
            difference.plot([place, place], [row["low"], row["high"]], color=colour, linewidth=2)
            ends = [row["low"], row["high"]]
            if not math.isnan(row["t_low"]):
                ends += [row["t_low"], row["t_high"]]
                difference.plot([place, place], ends[2:], color=colour, linewidth=0.7)
            reach = 1.1 * max(map(abs, ends))
            if reach > difference.get_ylim()[1]:
                difference.set_ylim(-reach, reach)
