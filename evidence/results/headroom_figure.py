# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Figure of the headroom: floor, scratch, converged and ceiling at each n, and Dice over doubled steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..study.study import CONTROL
from .convergence import Chain
from .figure import COLOURS, WIDTH, Rows, draw_arm, empty_figure
from .headroom_table import arms_of, results_at
from .records import Result
from .table import main_label

CHAIN_COLOURS = COLOURS[4:]  # not those of the arms


def headroom_figure(
    outline: Mapping[str, Any], results: Sequence[Result], rows: Rows, chains: Mapping[int, Chain]
) -> Figure:
    """Draw the headroom. What is not finished stays empty.

    Args:
        outline: outline of a study with a headroom.
        results: its finished runs.
        rows: `headroom_table.headroom_rows`.
        chains: n to its chain of doubled steps; empty if the study has no chain, which leaves its panel out.

    Returns:
        The figure, made without pyplot.
    """
    headroom, arms = outline["headroom"], arms_of(outline)
    columns = [outline["labels"].index(name) for name in outline["first_figure"]]
    figure, (dice, difference, *steps) = empty_figure(
        f"{outline['study']}: headroom",
        [str(n) for n in headroom["n"]],
        ends="circle: mean",
        ratios=(1, 1, 1) if chains else (1, 1),
    )
    at = {n: results_at(outline, results, chains, n) for n in headroom["n"]}
    others = iter(COLOURS[1:])
    for number, arm in enumerate(arms):
        colour = COLOURS[0] if arm == CONTROL else next(others)
        shift = WIDTH * (number - (len(arms) - 1) / 2)
        for place, n in enumerate(headroom["n"]):
            draw_arm(
                (dice, difference),
                headroom,
                at[n],
                rows,
                arm=arm,
                places={n: place + shift},
                colour=colour,
                label=main_label(outline),
                columns=columns,
            )
    handles = dict(zip(*reversed(dice.get_legend_handles_labels()), strict=True))  # one for each arm
    dice.legend(handles.values(), handles, fontsize=8, frameon=False, loc="best")
    for panel in (dice, difference):
        panel.set_xlabel("labelled patients")
    for panel in steps:
        _draw_chains(panel, chains)
    return figure


def _draw_chains(panel: Axes, chains: Mapping[int, Chain]) -> None:
    panel.set_title(f"{CONTROL}: Dice of the tuning patients; ring: enough", fontsize=10)
    panel.set_xlabel("steps")
    panel.set_xscale("log", base=2)
    for number, (n, chain) in enumerate(chains.items()):
        colour = CHAIN_COLOURS[number % len(CHAIN_COLOURS)]
        tried = list(chain.tried), list(chain.tried.values())
        panel.plot(*tried, "o-", color=colour, label=f"{n} labelled", markersize=4)
        if chain.chosen is not None:
            panel.plot(chain.chosen, chain.tried[chain.chosen], "o", color=colour, markersize=10, fillstyle="none")
    if steps := sorted({steps for chain in chains.values() for steps in chain.tried}):
        panel.set_xticks(steps, [str(each) for each in steps], rotation=45)
    panel.minorticks_off()
    panel.legend(fontsize=8, frameon=False, loc="best")
