# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Change defaults in the text of a YAML config, so that its comments stay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bundles.common.input_error import InputError


def set_defaults(path: Path, values: Mapping[str, Any]) -> None:
    """Write other values into the top-level entries of a config, each of which takes one line; comments stay.

    Args:
        path: the YAML file.
        values: entry to plain value (numbers, text, lists, None).

    Raises:
        InputError: if an entry is not there, or not on one line.
    """
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        entries = {name.value: (name.start_mark, node) for name, node in yaml.compose(text, yaml.SafeLoader).value}
        start, node = entries.get(key, (None, None))
        if start is None or not start.line == node.start_mark.line == node.end_mark.line:
            raise InputError(
                f"{path.parent.name}/{path.name}: {key} cannot be set: it must be there at the top level, its value on the same line."
            )
        text = f"{text[: node.start_mark.index]}{_plain(value)}{text[node.end_mark.index :]}"
    path.write_text(text, encoding="utf-8", newline="")


def _plain(value: Any) -> str:
    """A value on one line; JSON is YAML, but a word needs no quotes."""
    word = isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value) and yaml.safe_load(value) == value
    return value if word else json.dumps(value)
