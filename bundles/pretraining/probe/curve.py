# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Picture of the probe's Dice over the steps of the pre-training."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

MEAN = "probe_dice"
CLASS = f"{MEAN}_"


def curve_figure(rows: Sequence[dict[str, float]]) -> Figure:
    """Draw the mean Dice and that of each class over the steps, and what the mean is without pre-training.

    Args:
        rows: rows of ``probe.csv``, the first one at step 0.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    marker = {"marker": "o", "markersize": 3}
    for name in [name for name in rows[0] if name.startswith(CLASS)]:
        values = [row[name] for row in rows]
        axes.plot(steps, values, linewidth=1, alpha=0.6, label=name.removeprefix(CLASS).replace("_", " "), **marker)
    axes.plot(steps, [row[MEAN] for row in rows], color="black", linewidth=2.2, label="mean", **marker)
    axes.axhline(rows[0][MEAN], color="black", linestyle="--", linewidth=1, label="mean before training")
    axes.axhline(rows[-1]["intensity_alone"], color="grey", linestyle=":", linewidth=1.5, label="mean, intensity alone")
    axes.set(xlabel="step of the pre-training", ylabel="Dice", title="Linear probe on the frozen encoder")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
