# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Rewrite Swin encoder weights from one layout into another, and show what was found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..common.errors import InputError
from ..common.networks.swin_unetr import build_encoder
from ..common.run.option_checks import check_choice
from ..common.weights.checkpoint_file import save_atomically
from ..common.weights.dialects import describe_encoder, find_weights, official_layout
from ..common.weights.encoder_record import FIELDS
from ..common.weights.loading import load_encoder
from ..common.weights.merging_order import merging_of

logger = logging.getLogger(__name__)

LAYOUTS = ("encoder", "official")


def convert(
    *, source: str, target: str, layout: str = "encoder", merging: str | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """Write the encoder of ``source`` to ``target`` and print a table of what it is.

    Args:
        source: checkpoint of any origin (`common.checkpoint_dialect.find_weights`).
        target: file to write.
        layout: ``encoder``: ``encoder.pt`` of these bundles. ``official``: that of the released ``model_swinvit.pt``, which
            ``SwinUNETR.load_from`` reads; our encoder record stands beside the weights, where they do not look.
        merging: see `common.weights_merging.merging_of`.
        prefix: see `find_weights`.

    Returns:
        What the table shows.

    Raises:
        InputError: if the source has not the whole encoder, or the target would overwrite it.
    """
    check_choice(name="layout", value=layout, choices=LAYOUTS)
    if Path(source).exists() and Path(target).exists() and Path(source).samefile(target):
        raise InputError(f"--target {target} is the source itself: it would be overwritten. Choose another name.")
    found = find_weights(source, prefix=prefix)
    order, says = merging_of(found, merging)
    described = describe_encoder(found) | {"merging": order}
    record = {field: described[field] for field in FIELDS}
    if layout == "official" and record["use_v2"]:
        raise InputError(
            f"{source} has use_v2: SwinUNETR.load_from would leave out its layers1c to layers4c. Give users of it the encoder layout, which load_state_dict reads."
        )
    network = torch.nn.ModuleDict({"swinViT": build_encoder(record)})
    missing = sorted(set(network.state_dict()) - set(found.encoder))
    derived = [name for name in missing if name.endswith("relative_position_index")]
    if len(missing) > len(derived):
        absent = [name for name in missing if name not in derived]
        raise InputError(
            f"{source} lacks {len(absent)} tensors of its encoder, such as {absent[0]}: nothing was written."
        )
    encoder = {name: found.encoder.get(name, tensor) for name, tensor in network.state_dict().items()}
    shown = {
        "source": source,
        "recognised": ", ".join(found.dialect) or "MONAI's own names",
        "merging": f"{order}, says {says}",
        "encoder": ", ".join(f"{field} {record[field]}" for field in FIELDS if field != "merging"),
        "tensors": f"{len(encoder)}, of which {len(derived)} made up from the window" if derived else str(len(encoder)),
        "left over": f"{len(found.rest)}: {', '.join(sorted(found.rest)[:4])} ..." if found.rest else "none",
        "target": f"{target} ({layout})",
    }
    trained = dict(found.content.get("trained") or {}) | {"converted_from": Path(source).name}
    state = encoder if layout == "encoder" else official_layout(encoder)
    save_atomically({"state_dict": state, "encoder": record, "trained": trained}, target)
    load_encoder(network, target)  # what was written is what was meant
    table = Table(show_header=False)
    for name, value in shown.items():
        table.add_row(name, value)
    Console().print(table)
    if layout == "official" and order == "monai":
        logger.warning(
            "these weights were trained with the patch merging of MONAI 1.5 and newer: with MONAI 1.4 or older, which the official code "
            "was written for, they load and compute other features"
        )
    return shown
