# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The picture shows the rows of the table, and the two levels to compare them with."""

from __future__ import annotations

from bundles.pretraining.probe.curve import curve_figure


def test_lines_are_the_classes_the_mean_and_its_two_levels():
    rows = [
        {"step": 0, "probe_dice": 0.3, "probe_dice_liver": 0.2, "probe_dice_left_kidney": 0.4, "intensity_alone": 0.1},
        {"step": 50, "probe_dice": 0.6, "probe_dice_liver": 0.5, "probe_dice_left_kidney": 0.7, "intensity_alone": 0.1},
    ]
    (axes,) = curve_figure(rows).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["liver"] == ([0, 50], [0.2, 0.5])
    assert lines["left kidney"] == ([0, 50], [0.4, 0.7])
    assert lines["mean"] == ([0, 50], [0.3, 0.6])
    assert lines["mean before training"][1] == [0.3, 0.3]
    assert lines["mean, intensity alone"][1] == [0.1, 0.1]
