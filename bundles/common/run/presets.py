# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A preset is one set of values, chosen by name from ``configs/presets.yaml``; any value can still be overridden by its own option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..errors import InputError


def choose(*, preset: str, file: str) -> dict[str, Any]:
    """Return the values of one preset.

    The first preset of the file is complete; the others state what differs from it.

    Args:
        preset: name of the preset.
        file: YAML or JSON file, name of a preset to its values.

    Raises:
        InputError: if the file or the preset is not there, or it sets a value that the first preset does not know.
    """
    if not Path(file).is_file():
        raise InputError(f"{file} not found. Run inside the bundle's folder, or name that folder by --bundle_root.")
    presets = ConfigParser.load_config_file(file)
    if preset not in presets:
        raise InputError(f"--preset {preset!r} is not one of {', '.join(presets)} ({file}).")
    base_name, base = next(iter(presets.items()))
    unknown = sorted(set(presets[preset]) - set(base))
    if unknown:
        raise InputError(f"{file}: preset {preset!r} sets {', '.join(unknown)}, which {base_name!r} does not know.")
    return {**base, **presets[preset]}
