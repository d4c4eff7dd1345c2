# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find values of a bundle's configs that name a place on one machine: absolute paths and home folders."""

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
# A text in quotes inside an expression or a list, unless it is put behind a folder: $@output_dir + '/models'
QUOTED = re.compile(r"""(?P<behind>\+\s*)?(?P<quote>['"])(?P<text>.*?)(?P=quote)""")


def machine_paths(configs: Path) -> list[str]:
    """Places where a config names a path of one machine, such as ``train.yaml, dataset_dir: /home/me/data``.

    Comments, and paths that begin with another entry (``$@bundle_root + '/data'``), are left alone.

    Args:
        configs: the folder ``configs``: its YAML, JSON and ``logging.conf`` are read, in its subfolders, too.
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
            f"{path.relative_to(configs).as_posix()}, {key}: {value}" for key, value in values if _names_a_place(value)
        ]
    return found


def check_machine_paths(configs: Path) -> None:
    """Refuse configs that name a path of one machine.

    Raises:
        InputError: names every such value.
    """
    if found := machine_paths(configs):
        raise InputError(
            f"configs name paths of one machine: {'; '.join(found)}. Nobody else has them: write them relative to the bundle, "
            "such as $@bundle_root + '/data', and give your own on the command line."
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


def _names_a_place(value: str) -> bool:
    if PATH.match(value):
        return True
    return any(PATH.match(part["text"]) and not part["behind"] for part in QUOTED.finditer(value))
