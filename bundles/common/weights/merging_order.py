# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find the patch-merging order that a file's weights were trained with; the tensors do not show it."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..errors import InputError
from ..files import file_hash, file_stamp
from ..networks.patch_merging import MERGING
from .dialects import FoundWeights, describe_encoder

logger = logging.getLogger(__name__)

CATALOGUE = Path(__file__).with_name("known_weights.yaml")


@lru_cache
def _md5(path: str, size: int, changed: int) -> str:
    return file_hash(path, "md5")


def known_file(path: str) -> tuple[dict[str, Any] | None, bool]:
    """Return the file's row in ``known_weights.yaml``, by MD5 or else by name, and whether it is certain (by MD5)."""
    rows = ConfigParser.load_config_file(CATALOGUE)
    digest = _md5(str(path), *file_stamp(path))
    by_name = next((row for row in rows if Path(path).name in row["names"]), None)
    for row in rows:
        if digest in (row.get("md5") or {}).values():
            return row, True
    return by_name, False


def _compare(found: FoundWeights, known: dict[str, Any]) -> None:
    """Raise `InputError` if the encoder differs from that of the known file, for example in a truncated file."""
    described = describe_encoder(found)
    for field, value in (known.get("encoder") or {}).items():
        if described[field] != value:
            raise InputError(
                f"{found.path} differs from the known file of this name ({known['what']}): its {field} is {described[field]}, not {value}. "
                "It may be incomplete. If it is another file with the same name, set --merging."
            )


def merging_of(found: FoundWeights, asked: str | None) -> tuple[str, str]:
    """Return the patch-merging order, and the source of this information.

    Args:
        found: the weights.
        asked: ``monai`` or ``legacy`` as set by the user, or None.

    Raises:
        InputError: neither the file nor the table of known files nor the user states the order, or the user's choice
            contradicts them.
    """
    if asked is not None and asked not in MERGING:
        raise InputError(f"--merging {asked!r} is not one of {', '.join(MERGING)}.")
    recorded = source = None
    record = found.content.get("encoder")
    if isinstance(record, dict) and "merging" in record:
        recorded, source = record["merging"], "its own encoder record"
    else:
        known, certain = known_file(found.path)
        if asked is not None and not certain:
            if known is not None and asked != known["merging"]:
                logger.warning(
                    "%s: files of this name need merging %s (%s); using %s, as set by --merging",
                    *(found.path, known["merging"], known["what"], asked),
                )
            return asked, "--merging"
        if known is not None:
            recorded, source = (
                known["merging"],
                f"the table of known files ({known['what']}), by {'MD5' if certain else 'name'}",
            )
            _compare(found, known)
    if recorded is None:
        raise InputError(
            f"{found.path} does not record which MONAI version its weights were trained with, and is not in {CATALOGUE.name}. MONAI 1.5 changed the order "
            "in which patches are merged, but not the names and shapes: with the wrong order the weights load, but compute other features. Set --merging legacy "
            "for weights trained with MONAI 1.4 or older (most published weights), --merging monai for 1.5 or newer."
        )
    if asked not in (None, recorded):
        raise InputError(
            f"{found.path} needs --merging {recorded}, not {asked}, according to {source}. Remove --merging."
        )
    return recorded, source
