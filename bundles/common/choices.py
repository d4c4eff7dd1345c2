# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Options with a fixed set of values."""

from __future__ import annotations

from collections.abc import Sequence

from .input_error import InputError


def check_choice(*, name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        InputError: names the option, the value and the choices.
    """
    if value not in choices:
        raise InputError(f"--{name} {value!r} is not one of {', '.join(choices)}.")
