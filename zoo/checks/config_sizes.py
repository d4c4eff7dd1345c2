# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse configs that grow without limit when they are read: a YAML file of 330 bytes can stand for 10^9 values."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from bundles.common.errors import InputError

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 2**18  # the largest config of these bundles has 25 KB
MAX_VALUES = 200_000
MAX_DEPTH = 100


def check_config_sizes(folder: Path) -> None:
    """Check the YAML and JSON files of a bundle before anything else reads them.

    Raises:
        InputError: one is too large or too deeply nested, or its aliases stand for more than `MAX_VALUES` values.
    """
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{name} has {path.stat().st_size} bytes; a config has at most {MAX_BYTES}.")
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            if path.suffix == ".json":
                json.loads(text)
            else:
                _check_nesting(text, name)
                for document in yaml.compose_all(text, yaml.SafeLoader):
                    _count(document, name, {}, 0)
        except RecursionError:
            raise InputError(f"{name} is nested too deeply to be a config.") from None
        except InputError:
            raise
        except (yaml.YAMLError, ValueError):
            pass  # the check of this file says what is wrong


def _check_nesting(text: str, name: str) -> None:
    """Parse without building anything: deep nesting alone would exhaust the stack."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"{name} is nested too deeply to be a config (more than {MAX_DEPTH} levels).")


def _count(node: yaml.Node | None, name: str, known: dict[int, int], depth: int) -> int:
    """Return how many values a node stands for, its aliases written out."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if depth > MAX_DEPTH or known.get(id(node)) == 0:
        raise InputError(f"{name} contains itself through an alias, or is nested too deeply to be a config.")
    if id(node) not in known:
        known[id(node)] = 0  # begun
        inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(each, name, known, depth + 1) for each in inner)
    if known[id(node)] > MAX_VALUES:
        raise InputError(
            f"{name} stands for more than {MAX_VALUES} values: its aliases repeat each other. It is no config of a bundle; do "
            "not trust it."
        )
    return known[id(node)]
