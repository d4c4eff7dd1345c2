# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Figure of the results table: pre-trained against scratch for each task and label, and their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..segmentation.results.bootstrap import LEVEL
from .results_table import ALL_TASKS, MEAN

COLOURS = {"pretrained": "#0f766e", "scratch": "#c2410c"}
NAMES = {"pretrained": "pre-trained", "scratch": "scratch"}


def results_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw Dice and NSD of both arms with the paper's scores, and the paired difference in Dice with its interval.

    Args:
        rows: rows of `results_table.results_table`. A row without scores stays empty.

    Returns:
        The figure. It is made without pyplot, so it needs no display and is freed with its last reference.
    """
    figure = Figure(figsize=(12, 1.6 + 0.24 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    dice, nsd, difference = figure.subplots(1, 3, sharey=True)
    for panel, metric, title in ((dice, "dice", "Dice"), (nsd, "nsd", "NSD")):
        for arm, colour in COLOURS.items():
            _dots(panel, rows, f"{arm}_{metric}", marker="o", color=colour, label=NAMES[arm])
            paper_style = {
                "marker": "D",
                "markerfacecolor": "none",
                "color": colour,
                "label": f"{NAMES[arm]}, paper (other cases)",
            }
            if f"paper_{arm}_{metric}" in rows[0]:
                _dots(panel, rows, f"paper_{arm}_{metric}", **paper_style)
        panel.set_xlim(-0.03, 1.03)
        panel.set_title(title, fontsize=10)
    _dots(difference, rows, "difference_dice", marker="o", color="0.2")
    for position, row in enumerate(rows):
        if not math.isnan(row["difference_dice_low"]):
            interval = [row["difference_dice_low"], row["difference_dice_high"]]
            difference.plot(interval, [position, position], color="0.2")
    difference.axvline(0, color="0.6", linewidth=1)
    reach = max([0.05, *(abs(value) for row in rows for value in _ends(row) if not math.isnan(value))])
    difference.set_xlim(-1.08 * reach, 1.08 * reach)
    difference.set_title("Dice, pre-trained minus scratch", fontsize=10)
    difference.set_xlabel(f"same cases; bar: {LEVEL:.0%} interval", fontsize=8)

    names = [f"{row['task']}, {MEAN}" if row["label"] == MEAN else row["label"] for row in rows]
    dice.set_yticks(range(len(rows)), names, fontsize=8)
    dice.set_ylim(len(rows) - 0.5, -0.5)
    for text, row in zip(dice.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row["label"] == MEAN else "normal")
    for panel in (dice, nsd, difference):
        for position, row in enumerate(rows):
            if row["label"] == MEAN:
                shade = "0.93" if row["task"] != ALL_TASKS else "0.85"
                panel.axhspan(position - 0.5, position + 0.5, color=shade, zorder=0)
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*dice.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _ends(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["difference_dice"], row["difference_dice_low"], row["difference_dice_high"]


def _dots(panel: Axes, rows: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    panel.plot([row[key] for row in rows], range(len(rows)), linestyle="none", markersize=5, zorder=3, **style)
