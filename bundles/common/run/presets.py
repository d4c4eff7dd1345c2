# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read presets: named sets of values in ``configs/presets.yaml``. An option of the same name overrides a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..errors import InputError


def choose(*, preset: str, file: str) -> dict[str, Any]:
    """Return the values of one preset.

    The first preset of the file is complete. The others list only what differs from it.

    Args:
        preset: name of the preset.
        file: YAML or JSON file that maps the name of a preset to its values.

    Raises:
        InputError: the file or the preset does not exist, or the preset sets a value that the first preset lacks.
    """
    presets = _read(file)
    if preset not in presets:
        raise InputError(f"--preset {preset!r} is not one of {', '.join(presets)} ({file}).")
    base_name, base = next(iter(presets.items()))
    unknown = sorted(set(presets[preset]) - set(base))
    if unknown:
        raise InputError(
            f"{file}: preset {preset!r} sets {', '.join(unknown)}, which the first preset {base_name!r} lacks."
        )
    return {**base, **presets[preset]}


def preset_names(file: str) -> list[str]:
    """Return the names of the presets of a file.

    Raises:
        InputError: the file does not exist.
    """
    return list(_read(file))


def first_preset(file: str) -> dict[str, Any]:
    """Return the values of the first preset of a file, which is complete.

    Raises:
        InputError: the file does not exist.
    """
    return dict(next(iter(_read(file).values())))


def _read(file: str) -> dict[str, dict[str, Any]]:
    if not Path(file).is_file():
        raise InputError(f"{file} not found. Run inside the bundle's folder, or pass that folder as --bundle_root.")
    return ConfigParser.load_config_file(file)
