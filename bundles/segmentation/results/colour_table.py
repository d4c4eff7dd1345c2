# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Names and colours of the label values for 3D Slicer, which a NIfTI file has no place for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ...common.files import write_text
from ..models.label_names import names_by_value, organ_names
from .overlay import organ_colours

COLOUR_TABLE = "labels.ctbl"


def write_colour_table(folder: str | Path, *, labels: Mapping[int | str, str]) -> Path:
    """Write ``labels.ctbl``, Slicer's colour table, next to masks. The colours are those of the pictures.

    A line is ``value name red green blue opacity``, from 0 to 255. Slicer reads an underscore in a name as a space, and
    ends the name at a space (https://slicer.readthedocs.io/en/5.6/developer_guide/modules/colors.html).

    Args:
        folder: the masks' folder.
        labels: name of each label value; text keys, as in a JSON file, are read as numbers.

    Returns:
        The file.
    """
    colours = organ_colours(organ_names(labels))
    names = {0: "background"} | names_by_value(labels)
    lines = [f"# Color table file {COLOUR_TABLE}", f"# {len(names)} values"]
    for value, name in names.items():
        red, green, blue = (round(255 * channel) for channel in colours.get(value, (0, 0, 0)))
        plain = re.sub(r"\s+", "_", name.strip()) or f"label_{value}"
        lines.append(f"{value} {plain} {red} {green} {blue} {255 if value in colours else 0}")
    path = Path(folder) / COLOUR_TABLE
    write_text(path, "\n".join([*lines, ""]))
    return path
