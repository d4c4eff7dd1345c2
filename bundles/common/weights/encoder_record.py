# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The record that describes a Swin encoder and travels with its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..networks.patch_merging import MERGING
from ..run.options import plain_lists
from .dialects import describe_encoder, find_weights
from .merging_order import merging_of

logger = logging.getLogger(__name__)


#: Fields of the record, in the order in which they are shown.
FIELDS = ("in_channels", "feature_size", "depths", "num_heads", "window_size", "patch_size", "merging", "use_v2")


def read_record(
    path: str | None, *, merging: str | None = None, otherwise: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The encoder record of a checkpoint of any origin, or None if there is no path.

    Read off its tensors; the order of patch merging from the file's own record, the table of known files, or the user.

    Args:
        path: checkpoint file.
        merging: what the user says of it, or None.
        otherwise: see `describe_encoder`.

    Raises:
        InputError: if the file is missing, broken, holds no Swin encoder, or nobody knows its merging; or if its own record contradicts its tensors.
    """
    if path is None:
        return None
    found = find_weights(path)
    own = found.content.get("encoder")
    if otherwise is not None and isinstance(own, Mapping):
        otherwise = {**otherwise, **own}
    order, says = merging_of(found, merging)
    record = describe_encoder(found, otherwise=otherwise) | {"merging": order}
    if not isinstance(own, Mapping):
        logger.info("%s: patch merging %s, says %s", path, order, says)
    else:
        for field in FIELDS:
            if field in own and plain_lists(own[field]) != record[field]:
                raise InputError(
                    f"{path} contradicts itself: its record says {field} {own[field]}, its tensors {record[field]}. It was put together wrongly: make it again."
                )
    return {field: record[field] for field in FIELDS}


def resolve_encoder(
    *,
    asked: Mapping[str, Any],
    preset: Mapping[str, Any],
    checkpoint: str | None,
    patch_embed: str | None = None,
    allow_partial: Sequence[str] = (),
    optional: bool = False,
) -> dict[str, Any]:
    """Decide which encoder to build: what the user asked for, else what the checkpoint holds, else the preset.

    Args:
        asked: values of the config's knobs, None where the user left the choice open.
        preset: the preset's values (other keys are ignored).
        checkpoint: file whose weights will be loaded, or None.
        patch_embed: ``repeat`` lets a 1-channel checkpoint start a network with another number of channels, ``fresh`` any checkpoint (see
            `weights.load_encoder`); None: the channels must be equal.
        allow_partial: see `weights.load_encoder`: stages that the file lacks are then built as asked for, else as the preset has them.
        optional: take the preset where the checkpoint file does not exist (yet), as `verify_net_in_out` needs it.

    Returns:
        The record with every field of `FIELDS`.

    Raises:
        InputError: if the user asked for something that the checkpoint's weights do not fit, with both values.
    """
    asked = {field: plain_lists(value) for field, value in asked.items() if value is not None}
    if unknown := sorted(set(asked) - set(FIELDS)):
        raise InputError(f"unknown encoder fields {', '.join(unknown)}; known are {', '.join(FIELDS)}.")
    default = {"in_channels": 1, "patch_size": 2, "merging": "monai", "use_v2": False}
    default |= {field: plain_lists(preset[field]) for field in FIELDS if field in preset}
    absent = optional and checkpoint is not None and not Path(checkpoint).exists()
    record = None
    if absent:
        logger.warning(
            "%s is not there: the network is built as the preset says, with patch merging %s",
            checkpoint,
            asked.get("merging", "monai"),
        )
    else:
        otherwise = {**default, **asked} if allow_partial else None
        record = read_record(checkpoint, merging=asked.get("merging"), otherwise=otherwise)
    if record is not None:
        if patch_embed == "fresh" or (patch_embed == "repeat" and record["in_channels"] == 1):
            record["in_channels"] = asked.get("in_channels", record["in_channels"])
        different = [field for field in asked if asked[field] != record[field]]
        if different:
            said = "; ".join(f"{field} is {record[field]} there, {asked[field]} asked for" for field in different)
            raise InputError(
                f"{checkpoint} does not fit this run: {said}. Leave those options out to build the network of the file, "
                "or choose weights that were trained with them."
                + (
                    " --patch_embed fresh starts the patch embedding anew."
                    if patch_embed and "in_channels" in different
                    else ""
                )
            )
        for field in ("feature_size", "depths", "num_heads", "window_size", "use_v2"):
            if field in default and default[field] != record[field]:
                logger.info(
                    "%s: %s %s, as in the file (the preset has %s)", checkpoint, field, record[field], default[field]
                )
        default = record
    resolved = {**default, **asked}
    if missing := [field for field in FIELDS if field not in resolved]:
        raise InputError(f"neither the preset nor the command line says {', '.join(missing)} of the encoder.")
    if resolved["merging"] not in MERGING:
        raise InputError(f"merging {resolved['merging']!r} is not one of {', '.join(MERGING)}.")
    for stages in ("depths", "num_heads"):
        if len(resolved[stages]) != 4:
            raise InputError(f"{stages} {resolved[stages]} must have four numbers, one per stage of Swin UNETR.")
    for stage, heads in enumerate(resolved["num_heads"]):
        if resolved["feature_size"] * 2**stage % heads:
            raise InputError(
                f"feature_size {resolved['feature_size']} gives stage {stage + 1} {resolved['feature_size'] * 2**stage} channels, "
                f"which {heads} heads (num_heads {resolved['num_heads']}) do not divide."
            )
    if resolved["feature_size"] % 12:
        raise InputError(
            f"feature_size {resolved['feature_size']} must be a multiple of 12 (MONAI's Swin UNETR demands it)."
        )
    return resolved
