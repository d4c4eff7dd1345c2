# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Choose the labelled scans that give a scan its labels (its atlases), by where the scans are in the body."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...common.value_rules import ABOVE_ZERO, COUNT, SHARE, Rule, is_list
from .position.fit import Alignment, align
from .position.network import ScanPosition
from .scans_of_run import Scan

SCALES = Rule(
    "must be a number above 0, at most 1, then one of 1 or more",
    lambda value: is_list(value, 2) and 0 < value[0] <= 1 <= value[1],
)


@dataclass(frozen=True)
class Selection:
    """Which scans take part, and which labelled scans serve which.

    Attributes:
        atlases: most labelled scans to carry from, for each scan.
        min_common: least share of a scan's length along the body that a labelled scan must cover.
        max_residual: mm; a labelled scan whose predicted positions differ by more than this, on average over the axes,
            is not used; a scan without any is left out.
        scales: least and largest slope of the positions of a scan, in the network's mm per mm of the scan.
        min_agreement: Dice between copies that an organ needs; None: derived from the labelled scans, see
            ``wanted_dice``.
        wanted_dice: Dice that kept organs should have on average, when the labelled scans are left out one by one.
        otherwise: least ``min_agreement`` that is derived, and its value where fewer than three labelled scans, or too
            few organs, allow no derivation.
    """

    atlases: int = 5
    min_common: float = 0.3
    max_residual: float = 20.0
    scales: Sequence[float] = (0.2, 1.6)
    min_agreement: float | None = None
    wanted_dice: float = 0.6
    otherwise: float = 0.3

    def __post_init__(self) -> None:
        COUNT.check("atlases", self.atlases)
        SHARE.check("min_common", self.min_common)
        SHARE.check("wanted_dice", self.wanted_dice)
        SHARE.check("min_agreement_otherwise", self.otherwise)
        SHARE.or_null("the value derived from the labelled scans").check("min_agreement", self.min_agreement)
        SCALES.check("scales", self.scales)
        ABOVE_ZERO.check("max_residual", self.max_residual)


def choose_atlases(
    position: ScanPosition, labelled: dict[Scan, ScanPosition], selection: Selection, *, apart_from: Scan | None = None
) -> tuple[tuple[tuple[Scan, Alignment], ...], str]:
    """Choose the labelled scans to carry from.

    Args:
        position: position of the scan that gets labels.
        labelled: the labelled scans and their positions.
        selection: how many, and what each must meet.
        apart_from: a labelled scan that is measured: it and the other scans of its patient give no labels.

    Returns:
        The scans, best first, and how the scan lies over each (`Alignment`); or none, and why.
    """
    scans = [scan for scan in labelled if scan != apart_from and not same_patient(scan, apart_from)]
    if not scans:
        return (), "there is no labelled scan of another patient"
    lies = {scan: align(position.profiles, labelled[scan].profiles) for scan in scans}
    best = min(float(np.mean(each.residual)) for each in lies.values())
    if not math.isfinite(best):
        return (), "its positions overlap with those of no labelled scan: another region?"
    if best > selection.max_residual:
        return (), (
            f"its positions differ from those of every labelled scan, by {best:.0f} mm on average, more than "
            f"{selection.max_residual:g}: another region?"
        )
    fitting = [scan for scan in scans if np.mean(lies[scan].residual) <= selection.max_residual]
    common = max(lies[scan].common for scan in fitting)
    if common < selection.min_common:
        return (), (
            f"no labelled scan covers enough of it: {common:.0%} of its length at most, and {selection.min_common:.0%} "
            "are needed"
        )
    covering = [scan for scan in fitting if lies[scan].common >= selection.min_common]
    covering.sort(key=lambda scan: (-round(lies[scan].common, 1), float(np.mean(lies[scan].residual))))
    return tuple((scan, lies[scan]) for scan in covering[: selection.atlases]), ""


def same_patient(scan: Scan, other: Scan | None) -> bool:
    """Return whether two scans are known to be of one patient."""
    return other is not None and bool(scan.patient) and scan.patient == other.patient
