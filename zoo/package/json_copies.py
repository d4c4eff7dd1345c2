# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""JSON copies of the configs for clients that do not read YAML, such as ``monai.bundle.load``."""

from __future__ import annotations

import json
from pathlib import Path

from monai.bundle import ConfigParser

from bundles.common.files import write_text

#: ``monai.bundle.load`` only reads ``configs/WORKFLOW_TYPE.json``; MONAI Label prefers these files to YAML.
COPIED = ("inference", "train")


def write_json_copies(configs: Path) -> None:
    """Write ``inference.json`` and ``train.json`` next to the YAML files, with the same content.

    Args:
        configs: the folder ``configs``.
    """
    for name in COPIED:
        config = ConfigParser.load_config_file(str(configs / f"{name}.yaml"))
        write_text(configs / f"{name}.json", json.dumps(config, indent=4) + "\n")


def differing_copies(configs: Path) -> list[str]:
    """Return the names of JSON files whose content differs from the YAML file of the same name."""
    return [
        path.name
        for path in sorted(configs.glob("*.json"))
        if (twin := path.with_suffix(".yaml")).is_file()
        and ConfigParser.load_config_file(str(path)) != ConfigParser.load_config_file(str(twin))
    ]
