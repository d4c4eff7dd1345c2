# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Random splits of patients into training and validation."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..value_rules import whole_from
from ..words import counted

FOLDS = 5  # five-fold cross-validation, as in Tang et al., CVPR 2022


def draw_share(patients: Collection, *, share: float, seed: int) -> set:
    """Draw a share of the patients, at least one and never all; depends only on the seed and the patients."""
    distinct = sorted(patients)
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    # RandomState: NumPy guarantees that its stream does not change between versions.
    return {distinct[i] for i in np.random.RandomState(seed).permutation(len(distinct))[:count]}


def draw_folds(patients: list[str], path: Path, *, folds: int | None, seed: int) -> list[int]:
    """Draw a fold for each patient; return one number per entry of ``patients``, which may repeat."""
    distinct = sorted(set(patients))
    if folds is None:
        folds = FOLDS if len(distinct) < 2 else min(FOLDS, len(distinct))
    whole_from(2).check("folds", folds)
    if len(distinct) < folds:
        raise InputError(
            f"{path}: {counted(len(distinct), 'patient')} with training or validation scans cannot fill {folds} folds. Add a "
            '"validation" section to the list and use it (fold: null), use fewer folds (--folds), or train on all '
            "scans without validation (--fold all)."
        )
    drawn = np.random.RandomState(seed).permutation(len(distinct))
    fold_of = {distinct[index]: position % folds for position, index in enumerate(drawn)}
    return [fold_of[patient] for patient in patients]
