# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which order of patch merging a file's weights were trained with: the tensors do not tell."""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..errors import InputError
from ..files import file_stamp
from ..networks.patch_merging import MERGING
from .dialects import FoundWeights, describe_encoder

logger = logging.getLogger(__name__)

CATALOGUE = Path(__file__).with_name("known_weights.yaml")


@lru_cache
def _md5(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def known_file(path: str) -> tuple[dict[str, Any] | None, bool]:
    """The file's row in ``known_weights.yaml``, by MD5, else by name; and whether it is certain, which a name is not."""
    rows = ConfigParser.load_config_file(CATALOGUE)
    digest = _md5(str(path), *file_stamp(path))
    by_name = next((row for row in rows if Path(path).name in row["names"]), None)
    for row in rows:
        if digest in (row.get("md5") or {}).values():
            return row, True
    return by_name, False


def _compare(found: FoundWeights, known: dict[str, Any]) -> None:
    """A file that is known must have the encoder that it is known for: less is a truncated one."""
    described = describe_encoder(found)
    for field, value in (known.get("encoder") or {}).items():
        if described[field] != value:
            raise InputError(
                f"{found.path} is not what files of its name are ({known['what']}): its {field} is {described[field]}, not {value}. Is a part of it missing? "
                "If it is another file of that name, give --merging."
            )


def merging_of(found: FoundWeights, asked: str | None) -> tuple[str, str]:
    """The order of patch merging, and who says so.

    Args:
        found: the weights.
        asked: ``monai``, ``legacy``, or None where the user leaves it open.

    Raises:
        InputError: if neither the file nor the catalogue nor the user says it, or the user contradicts them.
    """
    if asked is not None and asked not in MERGING:
        raise InputError(f"--merging {asked!r} is not one of {', '.join(MERGING)}.")
    held = says = None
    record = found.content.get("encoder")
    if isinstance(record, dict) and "merging" in record:
        held, says = record["merging"], "its own encoder record"
    else:
        known, certain = known_file(found.path)
        if asked is not None and not certain:
            if known is not None and asked != known["merging"]:
                logger.warning(
                    "%s: files of this name want merging %s (%s); taken as %s, as you say",
                    *(found.path, known["merging"], known["what"], asked),
                )
            return asked, "--merging"
        if known is not None:
            held, says = (
                known["merging"],
                f"the table of known files ({known['what']}), by {'MD5' if certain else 'name'}",
            )
            _compare(found, known)
    if held is None:
        raise InputError(
            f"{found.path} does not say which MONAI its weights were trained with, and is not in {CATALOGUE.name}. MONAI 1.5 changed the order "
            "in which patches are merged, under the same names and shapes: with the wrong one the weights load and compute other features. Give --merging legacy "
            "for weights trained with MONAI 1.4 or older (most that are published), --merging monai for 1.5 or newer."
        )
    if asked not in (None, held):
        raise InputError(f"{found.path} wants --merging {held}, as {says} says, not {asked}. Leave --merging out.")
    return held, says
