# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Set the defaults of a packed bundle to the settings of its training, so that it works without options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.common.run.presets import choose

from .packed_weights import Weights

#: Settings that determine the voxels that the network sees: set in every workflow.
VOXELS = ("spacing", "hu_window", "roi_size", "foreground_hu")
#: Settings of the network: set for training that continues from these weights; other workflows read them from the file.
NETWORK = ("feature_size", "depths", "num_heads", "window_size", "merging")


def set_trained_defaults(configs: Path, weights: Weights) -> None:
    """Write the preset of the training, and the settings that differed from it, into train, evaluate and inference.

    Settings that the weights do not record are not changed.

    Args:
        configs: folder ``configs`` of the copy.
        weights: content of ``model.pt``.
    """
    presets = configs / "presets.yaml"
    preset = trained_preset(presets, weights)
    values = {"merging": "monai", **choose(preset=preset, file=str(presets))}
    for name in ("train", "evaluate", "inference"):
        path = configs / f"{name}.yaml"
        config = ConfigParser.load_config_file(str(path))
        wanted = {key: weights.trained[key] for key in VOXELS if key in weights.trained and key in config}
        changes = {
            key: value for key, value in wanted.items() if _default(config[key], values, otherwise=value) != value
        }
        if name == "train":
            changes |= {
                key: weights.encoder[key] for key in NETWORK if weights.encoder.get(key, values[key]) != values[key]
            }
        set_defaults(path, {"preset": preset, **changes})


def trained_preset(presets: Path, weights: Weights) -> str:
    """Return the name of the training's preset; the bundle's first preset if the weights do not record it."""
    table = yaml.safe_load(presets.read_text(encoding="utf-8"))
    recorded = weights.trained.get("preset")
    return recorded if recorded in table else next(iter(table))


def _default(entry: Any, values: dict[str, Any], *, otherwise: Any) -> Any:
    """Return the value of a config entry, without evaluating the config.

    Args:
        entry: a plain value, or an expression such as ``$@values['spacing']``.
        values: values of the preset.
        otherwise: returned for any other expression, such as one that reads the weights.
    """
    if isinstance(entry, str) and entry.startswith("$"):
        found = re.fullmatch(r"\$@values\['(\w+)'\]", entry)
        return values.get(found[1], otherwise) if found else otherwise
    return otherwise if isinstance(entry, dict) else entry


def set_defaults(path: Path, values: Mapping[str, Any]) -> None:
    """Set top-level entries of a config in place, each on a single line, and keep the comments.

    Args:
        path: the YAML file.
        values: entry to plain value (numbers, text, lists, None).

    Raises:
        InputError: an entry does not exist, or is not on one line.
    """
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        entries = {name.value: (name.start_mark, node) for name, node in yaml.compose(text, yaml.SafeLoader).value}
        start, node = entries.get(key, (None, None))
        if start is None or not start.line == node.start_mark.line == node.end_mark.line:
            raise InputError(
                f"{path.parent.name}/{path.name}: {key} cannot be set: it must be a top-level entry with its value on the same line."
            )
        text = f"{text[: node.start_mark.index]}{_yaml_text(value)}{text[node.end_mark.index :]}"
    path.write_text(text, encoding="utf-8", newline="")


def _yaml_text(value: Any) -> str:
    """Format a value as YAML on one line: as JSON, which is YAML, except that a word needs no quotes."""
    word = isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value) and yaml.safe_load(value) == value
    return value if word else json.dumps(value)
