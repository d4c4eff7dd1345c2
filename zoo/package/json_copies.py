# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""JSON copies of the configs for clients that read no YAML: ``monai.bundle.load`` reads ``configs/inference.json`` alone."""

from __future__ import annotations

import json
from pathlib import Path

from monai.bundle import ConfigParser

from bundles.common.files import write_text

#: ``monai.bundle.load`` reads ``configs/WORKFLOW_TYPE.json``; MONAI Label takes these before the YAML.
COPIED = ("inference", "train")


def write_json_copies(configs: Path) -> None:
    """Write ``inference.json`` and ``train.json`` beside the YAML files, equal in meaning.

    Args:
        configs: the folder ``configs``.
    """
    for name in COPIED:
        config = ConfigParser.load_config_file(str(configs / f"{name}.yaml"))
        write_text(configs / f"{name}.json", json.dumps(config, indent=4) + "\n")


def differing_copies(configs: Path) -> list[str]:
    """Names of the JSON files beside a YAML file of the same name that say something else."""
    return [
        path.name
        for path in sorted(configs.glob("*.json"))
        if (twin := path.with_suffix(".yaml")).is_file()
        and ConfigParser.load_config_file(str(path)) != ConfigParser.load_config_file(str(twin))
    ]
