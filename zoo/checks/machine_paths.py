# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find machine-specific paths in a bundle's configs: absolute paths and home folders."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bundles.common.errors import InputError

PATH = re.compile(r"\s*(?:sqlite:///|file://|%)?(?:/[^/\s]|~[/\\]|~$|\$HOME\b|\$\{HOME\}|[A-Za-z]:[\\/]|\\\\\w)")
# A quoted text inside an expression or list; "appended" if it follows another part, as in $@output_dir + '/models'
QUOTED = re.compile(r"""(?P<appended>\+\s*)?(?P<quote>['"])(?P<text>.*?)(?P=quote)""")


def machine_paths(configs: Path) -> list[str]:
    """List config values with a machine-specific path, such as ``train.yaml, dataset_dir: /home/me/data``.

    Comments are ignored, and so are paths that begin with another entry (``$@bundle_root + '/data'``).

    Args:
        configs: the folder ``configs``. Its YAML, JSON and ``logging.conf`` files are read, including subfolders.
    """
    found = []
    for path in sorted(path for path in configs.rglob("*") if path.is_file()):
        if path.suffix in (".yaml", ".yml", ".json"):
            text = path.read_text(encoding="utf-8")
            values = _values(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
        elif path.suffix == ".conf":
            parser = configparser.RawConfigParser()
            parser.read(path, encoding="utf-8")
            values = (
                (f"{section}, {key}", value) for section in parser.sections() for key, value in parser[section].items()
            )
        else:
            continue
        found += [
            f"{path.relative_to(configs).as_posix()}, {key}: {value}"
            for key, value in values
            if _has_machine_path(value)
        ]
    return found


def check_machine_paths(configs: Path) -> None:
    """Check that configs contain no machine-specific paths.

    Raises:
        InputError: lists every such value.
    """
    if found := machine_paths(configs):
        raise InputError(
            f"configs contain paths of one machine: {'; '.join(found)}. Other users do not have them. Make them "
            "relative to the bundle, such as $@bundle_root + '/data', and pass your own paths on the command line."
        )


def _values(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _values(value, f"{key}::{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _values(value, f"{key}::{number}")
    elif isinstance(node, str):
        yield key, node


def _has_machine_path(value: str) -> bool:
    if PATH.match(value):
        return True
    return any(PATH.match(part["text"]) and not part["appended"] for part in QUOTED.finditer(value))
