# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How much of a network comes from a file of weights, module by module."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from .dialects import ENCODER


def part_of(name: str) -> str:
    """Return the part of the network to which a tensor belongs.

    It is the tensor's top-level module, such as ``decoder5``; in the Swin transformer, ``swinViT.patch_embed`` or the
    stage, ``swinViT.layers1`` to ``swinViT.layers4`` (with the convolutions ``layers1c`` ... of Swin UNETR V2).
    """
    if not name.startswith(ENCODER):
        return name.split(".")[0]
    child = name.removeprefix(ENCODER).split(".")[0]
    return ENCODER + re.sub(r"^(layers\d)c$", r"\1", child)


def module_table(network: torch.nn.Module, loaded: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return for each top-level module of a network how many of its parameters come from a file.

    Args:
        network: the network.
        loaded: names of the tensors that were loaded.

    Returns:
        Module to ``{"from_file", "new", "parameters", "per_cent"}`` (numbers of parameters, and the first as a share of
        the third), in the order of the network; last, under ``all``, the sums.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        for key in (name.split(".")[0], "all"):
            row = table.setdefault(key, {"from_file": 0, "new": 0, "parameters": 0})
            row["from_file" if name in loaded else "new"] += parameter.numel()
            row["parameters"] += parameter.numel()
    for row in table.values():
        row["per_cent"] = round(100 * row["from_file"] / row["parameters"], 1)
    return {**{key: row for key, row in table.items() if key != "all"}, **({"all": table["all"]} if table else {})}


def table_text(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as aligned lines of text."""
    rows = [("module", "from the file", "new", "parameters", "%")]
    rows += [
        (name, f"{row['from_file']:,}", f"{row['new']:,}", f"{row['parameters']:,}", f"{row['per_cent']:.1f}")
        for name, row in table.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
