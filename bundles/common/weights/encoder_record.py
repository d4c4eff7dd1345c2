# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The encoder record: it describes a Swin encoder and is saved with its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..networks.patch_merging import MERGING
from ..run.options import plain_lists
from ..value_rules import COUNT, Rule, whole_from
from ..words import shown
from .dialects import describe_encoder, find_weights
from .merging_order import merging_of

logger = logging.getLogger(__name__)


FEATURE_SIZE = Rule(
    "must be a multiple of 12, as MONAI's Swin UNETR requires, such as 48",
    lambda value: COUNT.holds(value) and value % 12 == 0,
)
WINDOW_SIZE = whole_from(1, 32)  # tokens; the table of relative positions has (2 window - 1)^3 rows
#: Fields of the record, in display order.
FIELDS = ("in_channels", "feature_size", "depths", "num_heads", "window_size", "patch_size", "merging", "use_v2")


def read_record(
    path: str | None, *, merging: str | None = None, otherwise: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the encoder record of a checkpoint from any source, or None if ``path`` is None.

    It is derived from the tensors. The patch-merging order comes from the file's own record, the table of known files,
    or the user.

    Args:
        path: checkpoint file.
        merging: the patch-merging order set by the user, or None.
        otherwise: see `describe_encoder`.

    Raises:
        InputError: the file is missing, broken, or contains no Swin encoder; its patch-merging order is unknown; or its
            own record contradicts its tensors.
    """
    if path is None:
        return None
    found = find_weights(path)
    own = found.content.get("encoder")
    if otherwise is not None and isinstance(own, Mapping):
        otherwise = {**otherwise, **own}
    order, source = merging_of(found, merging)
    record = describe_encoder(found, otherwise=otherwise) | {"merging": order}
    if not isinstance(own, Mapping):
        logger.info("%s: patch merging %s, according to %s", path, order, source)
    else:
        for field in FIELDS:
            if field in own and plain_lists(own[field]) != record[field]:
                raise InputError(
                    f"{path} contradicts itself: {field} is {shown(own[field])} in its record, but {shown(record[field])} by its tensors. Create the file again."
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
    """Decide which encoder to build: by the user's options, else the checkpoint, else the preset.

    Args:
        asked: values of the config's options; None for options that the user did not set.
        preset: the preset's values (other keys are ignored).
        checkpoint: file whose weights will be loaded, or None.
        patch_embed: ``repeat`` allows a 1-channel checkpoint for a network with more channels, ``fresh`` any number of
            channels (see `load_encoder`); None: the numbers of channels must be equal.
        allow_partial: see `load_encoder`. Stages that the file lacks are built by the user's options, else the preset.
        optional: use the preset if the checkpoint file does not exist (yet), which `verify_net_in_out` needs.

    Returns:
        The record with every field of `FIELDS`.

    Raises:
        InputError: the options do not fit the checkpoint's weights (names both values), or such an encoder cannot be
            built.
    """
    asked = {field: plain_lists(value) for field, value in asked.items() if value is not None}
    if unknown := sorted(set(asked) - set(FIELDS)):
        raise InputError(f"unknown encoder fields {', '.join(unknown)}; known fields: {', '.join(FIELDS)}.")
    default = {"in_channels": 1, "patch_size": 2, "merging": "monai", "use_v2": False}
    default |= {field: plain_lists(preset[field]) for field in FIELDS if field in preset}
    absent = optional and checkpoint is not None and not Path(checkpoint).exists()
    record = None
    if absent:
        logger.warning(
            "%s does not exist: the network is built from the preset, with patch merging %s",
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
            details = "; ".join(
                f"{field} is {shown(record[field])} in the file, {shown(asked[field])} requested" for field in different
            )
            raise InputError(
                f"{checkpoint} does not fit this run: {details}. Remove these options to build the network of the file, "
                "or choose weights that were trained with them."
                + (
                    " --patch_embed fresh initialises a new patch embedding."
                    if patch_embed and "in_channels" in different
                    else ""
                )
            )
        for field in ("feature_size", "depths", "num_heads", "window_size", "use_v2"):
            if field in default and default[field] != record[field]:
                logger.info(
                    "%s: %s %s, as in the file (the preset has %s)",
                    *(checkpoint, field, shown(record[field]), shown(default[field])),
                )
        default = record
    resolved = {**default, **asked}
    if missing := [field for field in FIELDS if field not in resolved]:
        raise InputError(f"neither the preset nor the command line sets {', '.join(missing)} of the encoder.")
    if resolved["merging"] not in MERGING:
        raise InputError(f"merging {resolved['merging']!r} is not one of {', '.join(MERGING)}.")
    for stages in ("depths", "num_heads"):
        if len(resolved[stages]) != 4:
            raise InputError(f"{stages} {resolved[stages]} must have four numbers, one per stage of Swin UNETR.")
    FEATURE_SIZE.check("feature_size", resolved["feature_size"])
    WINDOW_SIZE.check("window_size", resolved["window_size"])
    for stage, heads in enumerate(resolved["num_heads"]):
        if resolved["feature_size"] * 2**stage % heads:
            raise InputError(
                f"feature_size {resolved['feature_size']} gives stage {stage + 1} {resolved['feature_size'] * 2**stage} channels, "
                f"which {heads} heads (num_heads {resolved['num_heads']}) do not divide."
            )
    return resolved
