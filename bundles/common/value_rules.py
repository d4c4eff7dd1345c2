# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What the value of an option must be, stated and checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        expected: completes "--name value ...".
        holds: whether a value satisfies the rule. It must accept values of any type.
        otherwise: the rule for a value that is not null, if this one allows null.
    """

    expected: str
    holds: Callable[[Any], bool]
    otherwise: Rule | None = None

    def check(self, name: str, value: Any, *, not_null: bool = False) -> None:
        """Check the value of the option ``name``.

        Args:
            name: the option's name.
            value: its value.
            not_null: refuse null, which some rules accept because it has a meaning in some configs.

        Raises:
            InputError: names the option, the value and what it must be.
        """
        rule = self.not_null() if not_null else self
        if not rule.holds(value):
            raise InputError(f"--{name} {value!r} {rule.expected}.")

    def or_null(self, meaning: str) -> Rule:
        """Return this rule for an option that may also be null; ``meaning`` completes "null for ..."."""
        return Rule(f"{self.expected}, or null for {meaning}", lambda value: value is None or self.holds(value), self)

    def not_null(self) -> Rule:
        """Return this rule without null."""
        return self.otherwise or Rule(self.expected, lambda value: value is not None and self.holds(value))


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; true and false are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer, also of NumPy; true, false and 1.0 are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_list(value: Any, length: int) -> bool:
    """Return whether a value is a list of ``length`` finite numbers."""
    return isinstance(value, (list, tuple)) and len(value) == length and all(map(is_number, value))


def whole_from(least: int, most: int | None = None) -> Rule:
    """Return the rule of a whole number with a lower limit, and maybe an upper one."""
    limit = "" if most is None else f", at most {most}"
    return Rule(
        f"must be a whole number, {least} or more{limit}",
        lambda value: is_whole(value) and value >= least and (most is None or value <= most),
    )


def one_of(*choices: str) -> Rule:
    """Return the rule of an option with a fixed set of values."""
    return Rule(f"is not one of {', '.join(choices)}", lambda value: value in choices)


def check_choice(*, name: str, value: object, choices: Sequence[str]) -> None:
    """Check the value of an option whose choices its user knows.

    Raises:
        InputError: names the option, the value and the choices.
    """
    one_of(*choices).check(name, value)


WHOLE = whole_from(0)
COUNT = whole_from(1)
NUMBER = Rule("must be a number", is_number)
ABOVE_ZERO = Rule("must be a number above 0", lambda value: is_number(value) and value > 0)
ZERO_OR_ABOVE = Rule("must be a number, 0 or above", lambda value: is_number(value) and value >= 0)
SHARE = Rule("must be a number from 0 to 1", is_share)
SHARE_BELOW_ONE = Rule("must be a number, 0 or above and below 1", lambda value: is_share(value) and value < 1)
SHARE_ABOVE_ZERO = Rule("must be a number above 0, at most 1", lambda value: is_share(value) and value > 0)
SHARE_INSIDE = Rule("must be a number above 0 and below 1", lambda value: is_share(value) and 0 < value < 1)
SEED = Rule("must be a whole number from 0 to 2^32 - 1", lambda value: is_whole(value) and 0 <= value < 2**32)
SWITCH = Rule("must be true or false", lambda value: isinstance(value, bool))
WORKERS = WHOLE.or_null("one per core")
