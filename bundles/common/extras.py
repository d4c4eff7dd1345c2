# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Packages that only some work needs: imported where they are used, and named with the cure if they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import InputError


def import_extra(module: str, *, extra: str, use: str) -> ModuleType:
    """Return a module of a package that the installation may lack.

    Args:
        module: its name, which is also the name of the package.
        extra: the extra of setup.cfg that has it.
        use: what needs it, the first words of the message.

    Raises:
        InputError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(f"{use} needs the package {module}, which is not installed. {cure(extra, module)}") from None


def cure(extra: str, *packages: str) -> str:
    """Return how to install an extra: in the project's folder, and in any other environment."""
    return f"Run `make install EXTRAS={extra}` in the project's folder, or `pip install {' '.join(packages)}`."
