# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Box plots of the scores of an evaluation, with one row per organ and one dot per case."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

COLOUR = "#0f766e"
TITLES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 (mm, logarithmic beyond 10)"}
LINEAR_MM = 10.0  # logarithmic above: one bad case at 200 mm would compress all others on a linear axis
HD95_TICKS = (0, 2, 4, 6, 8, 10, 20, 50, 100, 200, 500)
LEGEND = "dot: a case    box: quartiles    line: median    diamond: mean"


def score_figure(rows: Iterable[Mapping[str, Any]], *, organs: Iterable[str]) -> Figure:
    """Draw Dice, NSD and HD95 of each organ over the cases.

    The box shows the first and third quartile, the line the median, the diamond the mean. The whiskers reach to the
    last case within 1.5 times the length of the box. Every case is a dot, so outliers have no extra marks; a single
    case has no box. Below the organ's name is the number n of cases in which at least one mask has the organ. Next to
    HD95 is the number of those without a value, because only one mask has the organ (see `metrics.score_case`).

    Args:
        rows: dictionaries with the keys ``label``, ``dice``, ``nsd`` and ``hd95`` (mm); NaN for a missing score.
        organs: the organ names, from top to bottom.

    Returns:
        The figure, made without pyplot: it needs no display, and is freed with its last reference.
    """
    rows, organs = list(rows), list(organs)
    figure = Figure(figsize=(11, 1.2 + 0.5 * len(organs)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TITLES), sharey=True)
    scored = {}
    for panel, (metric, title) in zip(panels, TITLES.items(), strict=True):
        values = [[row[metric] for row in rows if row["label"] == organ] for organ in organs]
        values = scored[metric] = [[value for value in of_organ if not math.isnan(value)] for of_organ in values]
        _boxes(panel, values)
        panel.set_title(title, fontsize=10)
    for panel in panels[:2]:
        panel.set_xlim(-0.03, 1.03)
    panels[2].set_xscale("symlog", linthresh=LINEAR_MM, linscale=1.5)
    panels[2].set_xlim(-0.2, 1.15 * max([LINEAR_MM, *itertools.chain.from_iterable(scored["hd95"])]))
    panels[2].set_xticks([tick for tick in HD95_TICKS if tick <= panels[2].get_xlim()[1]])
    panels[2].xaxis.set_major_formatter("{x:g}")
    panels[2].xaxis.set_minor_locator(NullLocator())

    places, count = range(len(organs)), [len(values) for values in scored["dice"]]
    panels[0].set_yticks(places, [f"{organ}\nn = {n}" for organ, n in zip(organs, count, strict=True)], fontsize=8)
    panels[0].set_ylim(len(organs) - 0.5, -0.5)
    for place in places:
        missed = count[place] - len(scored["hd95"][place])
        if missed:
            beside = {"transform": panels[2].get_yaxis_transform(), "fontsize": 8, "va": "center"}
            panels[2].text(1.01, place, f"{missed}\nmissed", **beside)
    figure.supxlabel(LEGEND, fontsize=8)
    return figure


def _boxes(panel: Axes, values: list[list[float]]) -> None:
    """Draw a box and the dots of each organ, the first at the top."""
    places = [place for place, of_organ in enumerate(values) if len(of_organ) > 1]
    if places:  # boxplot() fails for an empty list
        panel.boxplot(
            [values[place] for place in places],
            positions=places,
            orientation="horizontal",
            widths=0.6,
            showfliers=False,
            showmeans=True,
            manage_ticks=False,
            patch_artist=True,
            boxprops={"facecolor": "none", "edgecolor": "0.45"},
            whiskerprops={"color": "0.45"},
            capprops={"color": "0.45"},
            medianprops={"color": "black", "linewidth": 1.6},
            meanprops={
                "marker": "D",
                "markerfacecolor": "white",
                "markeredgecolor": "black",
                "markersize": 4,
                "zorder": 4,
            },
        )
    for place, of_organ in enumerate(values):
        # Spread the dots over the height of the box, independently of the score: multiples of the golden ratio.
        offsets = (np.arange(1, len(of_organ) + 1) * 0.618034 % 1 - 0.5) * 0.44 if len(of_organ) > 1 else 0.0
        heights = np.full(len(of_organ), float(place)) + offsets
        panel.plot(of_organ, heights, "o", color=COLOUR, markersize=3.5, alpha=0.7, markeredgewidth=0, zorder=3)
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right", "left"]].set_visible(False)
