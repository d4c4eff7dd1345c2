# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse option values that would crash or mislead a run hours after its start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from ..errors import InputError


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise InputError(f"--{name} {value!r} must be {wanted}.")


def check_options(
    *,
    whole: Mapping[str, Any] | None = None,
    above_zero: Mapping[str, Any] | None = None,
    zero_or_above: Mapping[str, Any] | None = None,
    true_or_false: Mapping[str, Any] | None = None,
    spacing: Sequence[float] | None = None,
    hu_window: Sequence[float] | None = None,
    overlap: float | Sequence[float] = 0.0,
) -> None:
    """Check values by what they are.

    Args:
        whole: name to value of whole numbers, 1 or more.
        above_zero, zero_or_above: of numbers.
        true_or_false: of switches.
        spacing: three sizes of a voxel in mm, or None.
        hu_window: the lower and the upper end, or None.
        overlap: share of a window, one or one per axis.

    Raises:
        InputError: names the option, the value and what it must be.
    """
    for name, value in (whole or {}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _refuse(name, value, "a whole number, 1 or more")
    for name, value in (above_zero or {}).items():
        if not _is_number(value) or value <= 0:
            _refuse(name, value, "a number above 0")
    for name, value in (zero_or_above or {}).items():
        if not _is_number(value) or value < 0:
            _refuse(name, value, "a number, 0 or above")
    for name, value in (true_or_false or {}).items():
        if not isinstance(value, bool):
            _refuse(name, value, "true or false")
    if spacing is not None:
        sizes = spacing if isinstance(spacing, (list, tuple)) else []
        if len(sizes) != 3 or not all(_is_number(size) and size > 0 for size in sizes):
            _refuse("spacing", spacing, "three sizes in mm above 0, such as [1.5,1.5,2.0]")
    if hu_window is not None:
        ends = hu_window if isinstance(hu_window, (list, tuple)) else []
        if len(ends) != 2 or not all(map(_is_number, ends)) or ends[0] >= ends[1]:
            _refuse("hu_window", hu_window, "two values in HU, the lower one first, such as [-175.0,250.0]")
    shares = overlap if isinstance(overlap, (list, tuple)) else [overlap]
    if not all(_is_number(share) and 0 <= share < 1 for share in shares):
        _refuse("overlap", overlap, "a share of the window, 0 or more and below 1")


def check_choice(*, name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        InputError: names the option, the value and the choices.
    """
    if value not in choices:
        raise InputError(f"--{name} {value!r} is not one of {', '.join(choices)}.")
