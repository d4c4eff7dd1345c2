# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse files of weights whose records would run code as part of a MONAI config.

A file that opens with ``weights_only=True`` may still hold text such as ``$__import__('os').system(...)`` in its
records. MONAI evaluates text that begins with ``$``, follows ``@`` and ``%``, and builds a dictionary that has
``_target_``, wherever it stands in a config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError

RECORDS = ("encoder", "trained", "labels", "task", "row", "heads", "tasks")  # entries of a file that are used
CONFIG_KEY = re.compile(r"_\w+_")  # _target_, _disabled_, _mode_ ...


def check_plain_facts(content: Any, path: str) -> None:
    """Check the records of an opened file (`RECORDS`).

    Raises:
        InputError: a text begins with ``$``, ``@`` or ``%``, or a dictionary has a key such as ``_target_``.
    """
    if isinstance(content, Mapping):
        for name in RECORDS:
            _check(content.get(name), name, path)


def _check(value: Any, where: str, path: str) -> None:
    if isinstance(value, str) and value.lstrip().startswith(("$", "@", "%")):
        raise InputError(
            f"{path} was refused: its record {where} is {value[:60]!r}, which MONAI would run or follow as part of a "
            "config. No training of these bundles writes that; do not trust the file."
        )
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and CONFIG_KEY.fullmatch(key.strip()):
                raise InputError(
                    f"{path} was refused: its record {where} has the key {key!r}, from which MONAI would build an object. "
                    "No training of these bundles writes that; do not trust the file."
                )
            _check(key, where, path)
            _check(inner, f"{where}::{key}", path)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            _check(inner, where, path)
