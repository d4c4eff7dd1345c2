# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Convert Swin encoder weights from one layout into another, and show what was found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..common.errors import InputError
from ..common.networks.swin_unetr import build_encoder
from ..common.run.options import PATH
from ..common.value_rules import check_choice
from ..common.weights.checkpoint_file import save_atomically
from ..common.weights.dialects import describe_encoder, find_weights, official_layout
from ..common.weights.encoder_record import FIELDS
from ..common.weights.loading import load_exactly
from ..common.weights.merging_order import merging_of

logger = logging.getLogger(__name__)

LAYOUTS = ("encoder", "official")


def convert(
    *, source: str, target: str, layout: str = "encoder", merging: str | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """Write the encoder of ``source`` to ``target`` and print a table that describes it.

    Args:
        source: checkpoint of any origin (`common.weights.dialects.find_weights`).
        target: file to write.
        layout: ``encoder``: that of ``encoder.pt`` of these bundles. ``official``: that of the released
            ``model_swinvit.pt``, which ``SwinUNETR.load_from`` reads; the encoder record of these bundles is added next
            to the weights, where it is ignored.
        merging: see `common.weights.merging_order.merging_of`.
        prefix: see `find_weights`.

    Returns:
        The rows of the table.

    Raises:
        InputError: the source does not have the complete encoder, its tensors are not finite numbers or do not fit each
            other, or the target would overwrite it. Nothing is written then.
    """
    check_choice(name="layout", value=layout, choices=LAYOUTS)
    PATH.check("source", source)
    PATH.check("target", target)
    source, target = (str(Path(str(path)).expanduser()) for path in (source, target))
    if Path(target).is_dir():
        raise InputError(
            f"--target {target} is a folder: pass the file to write, such as {Path(target, 'encoder.pt')}."
        )
    if Path(source).exists() and Path(target).exists() and Path(source).samefile(target):
        raise InputError(f"--target {target} is the source itself: it would be overwritten. Choose another name.")
    found = find_weights(source, prefix=prefix)
    order, origin = merging_of(found, merging)
    described = describe_encoder(found) | {"merging": order}
    record = {field: described[field] for field in FIELDS}
    if layout == "official" and record["use_v2"]:
        raise InputError(
            f"{source} has use_v2: SwinUNETR.load_from would ignore its layers1c to layers4c. Use --layout encoder, "
            "which load_state_dict reads."
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
    load_exactly(network, encoder, set(encoder), source)  # before anything is written: a bad file replaces no good one
    shown = {
        "source": source,
        "recognised": ", ".join(found.dialect) or "MONAI's own names",
        "merging": f"{order}, according to {origin}",
        "encoder": ", ".join(f"{field} {record[field]}" for field in FIELDS if field != "merging"),
        "tensors": f"{len(encoder)}, {len(derived)} of them computed from the window" if derived else str(len(encoder)),
        "unused": f"{len(found.rest)}: {', '.join(sorted(found.rest)[:4])} ..." if found.rest else "none",
        "target": f"{target} ({layout})",
    }
    trained = dict(found.content.get("trained") or {}) | {"converted_from": Path(source).name}
    state = encoder if layout == "encoder" else official_layout(encoder)
    try:
        save_atomically({"state_dict": state, "encoder": record, "trained": trained}, target)
    except OSError as error:
        raise InputError(f"--target {target} cannot be written: {error.strerror}. Choose another folder.") from error
    table = Table(show_header=False)
    for name, value in shown.items():
        table.add_row(name, value)
    Console().print(table)
    if layout == "official" and order == "monai":
        logger.warning(
            "these weights were trained with the patch merging of MONAI 1.5 and newer: MONAI 1.4 or older, for which "
            "the official code was written, loads them without an error but computes different features"
        )
    return shown
