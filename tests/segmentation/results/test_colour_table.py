# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The colour table has the form that 3D Slicer documents: value name red green blue opacity."""

from __future__ import annotations

from bundles.segmentation.results.colour_table import write_colour_table
from bundles.segmentation.results.overlay import organ_colours


def test_every_value_has_a_line_with_its_name_and_the_colour_of_the_pictures(tmp_path):
    labels = {"0": "background", "2": "left  kidney\n", "10": "Über-Organ", "1": " "}
    path = write_colour_table(tmp_path, labels=labels)
    first, second, *lines = path.read_text(encoding="utf-8").splitlines()
    assert (path.name, first, second) == ("labels.ctbl", "# Color table file labels.ctbl", "# 4 values")
    rows = [line.split(" ") for line in lines]
    assert [row[:2] for row in rows] == [
        ["0", "background"],
        ["1", "label_1"],
        ["2", "left_kidney"],
        ["10", "Über-Organ"],
    ]
    assert rows[0][2:] == ["0", "0", "0", "0"]
    for value, (*_, red, green, blue, opacity) in zip((1, 2, 10), rows[1:], strict=True):
        colour = [round(255 * channel) for channel in organ_colours([2, 10, 1])[value]]
        assert [int(red), int(green), int(blue)] == colour and opacity == "255"
    assert len({tuple(row[2:5]) for row in rows}) == 4
