# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Warn if a pre-training network is scored on scans that it learnt from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ...common.data.list_fingerprint import fingerprint

logger = logging.getLogger(__name__)


def warn_of_seen_scans(model: str, *, trained: Mapping[str, Any], section: str, scans: Sequence[dict]) -> None:
    """Warn if the scored scans are not those that the training held out, by their names and sizes.

    Args:
        model: file of the network, for the message.
        trained: what it records about its training.
        section: the section that is scored; only ``validation`` promises new scans.
        scans: the scored scans, ``{"image": path or list of paths}``.
    """
    held_out = trained.get("validation_scans")
    if section == "validation" and held_out and held_out != fingerprint(scans):
        logger.warning(
            "%s held out other scans (%s) than the %d scored here, by their names and sizes: it may have learnt from some of "
            "these, so the figures may be too good. Use --dataset_dir, --data, --seed and --validation_share of its training",
            *(model, held_out.get("number", "?"), len(scans)),
        )
