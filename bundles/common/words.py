# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Numbers and values as in a sentence: "1 scan", "2 scans", "spleen, liver", never a Python list or dictionary."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 scan``, ``2 scans``.

    Args:
        number: how many.
        noun: the noun in the singular.
        plural: its plural, if this is not the noun with an ``s``.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends with one, or with a question mark."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def shown(value: Any) -> str:
    """Return a value of an option or a record as a person writes it.

    Lists are written with commas (``1.5, 1.5, 2.0``), dictionaries as ``spleen: 1, liver: 2``, sets in order; None, True
    and False as in YAML. A collection inside a collection stands in brackets.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_inner(part)}" for key, part in value.items()) or "nothing"
    if isinstance(value, AbstractSet):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_inner, value)) or "nothing"
    return str(value)


def _inner(value: Any) -> str:
    nested = isinstance(value, (Mapping, AbstractSet, list, tuple))
    return f"({shown(value)})" if nested else shown(value)


def did_you_mean(word: Any, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6, before: str = "") -> str:
    """Return ``Did you mean a or b? `` with the most similar words and a space after it, or "" if none is similar.

    Args:
        word: what somebody wrote.
        known: what is allowed.
        most: number of words to offer.
        cutoff: see `difflib.get_close_matches`.
        before: what is written before each word, such as ``--``.
    """
    near = difflib.get_close_matches(str(word), list(known), n=most, cutoff=cutoff)
    return f"Did you mean {' or '.join(before + name for name in near)}? " if near else ""


def plain_name(name: Any) -> str:
    """Normalise a name in any script: lower case, one underscore for each run of other characters: ``left_kidney``."""
    return re.sub(r"[\W_]+", "_", str(name).casefold()).strip("_")
