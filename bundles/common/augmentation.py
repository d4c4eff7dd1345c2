# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""How often each random transform of a segmentation training happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

from .input_error import InputError

KINDS = ("flip", "rot90", "affine", "noise", "contrast", "scale_intensity", "shift_intensity")


def chances(augmentation: Mapping[str, float | Sequence[float]]) -> dict[str, float | list[float]]:
    """The probability of every kind of augmentation; one that is not named does not happen.

    Args:
        augmentation: kind (`KINDS`) to probability. ``flip`` is that of each axis; three numbers are those of x, y and z.

    Raises:
        InputError: an unknown kind, or a probability outside [0, 1].
    """
    if not isinstance(augmentation, Mapping):
        raise InputError(
            f"--augmentation {augmentation!r} must name probabilities, such as \"{{'flip': 0.5, 'noise': 0.1}}\"."
        )
    unknown = sorted(set(augmentation) - set(KINDS))
    if unknown:
        raise InputError(f"--augmentation names {', '.join(unknown)}; what there is: {', '.join(KINDS)}.")
    asked = {kind: augmentation.get(kind, 0.0) for kind in KINDS}
    flips = asked.pop("flip")
    if not isinstance(flips, Sequence) or isinstance(flips, str):
        flips = [flips] * 3
    if len(flips) != 3:
        raise InputError(f"--augmentation: flip {flips!r} must be one probability, or one for each of the three axes.")
    return {
        "flip": [_probability("flip", flip) for flip in flips],
        **{kind: _probability(kind, chance) for kind, chance in asked.items()},
    }


def _probability(kind: str, chance: object) -> float:
    if isinstance(chance, bool) or not isinstance(chance, Real) or not 0 <= chance <= 1:
        raise InputError(f"--augmentation: {kind} {chance!r} must be a probability between 0 and 1.")
    return float(chance)
