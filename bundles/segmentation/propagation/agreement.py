# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Decide for each scan and organ whether its carried label is kept: do the copies agree, and is the size plausible?

Copies that several labelled scans carried to one scan err in different ways. Where they agree, they are more often
right. How much more is measured by leaving out one labelled scan after another (`LeftOut`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr

from ...common.errors import InputError
from ...common.value_rules import SHARE, Rule, is_list, is_number
from .fusion import IGNORE


def dice_of_organs(one: np.ndarray, other: np.ndarray, *, labels: Mapping[int, str]) -> dict[str, float]:
    """Return the Dice of each organ over the voxels where both label maps have an answer.

    Args:
        one: integers (X, Y, Z); `IGNORE` means no answer.
        other: the same on the same voxels.
        labels: organ name of each label value; the background cannot be named.

    Returns:
        Dice by organ; NaN for an organ in neither map, as in all scores of the project.

    Raises:
        InputError: the shapes differ, or a label value is out of range.
    """
    if one.shape != other.shape:
        raise InputError(f"The label maps have the shapes {one.shape} and {other.shape}: they must be equal.")
    if not labels or min(labels) < 1 or max(labels) >= IGNORE:
        raise InputError(f"labels is {dict(labels)}: name at least one organ, by label values from 1 to {IGNORE - 1}.")
    answered = (one != IGNORE) & (other != IGNORE)
    one, other = one[answered], other[answered]
    sizes = [np.bincount(array, minlength=IGNORE + 1) for array in (one, other, one[one == other])]
    dice = {}
    for value, organ in labels.items():
        first, second, both = (int(size[value]) for size in sizes)
        dice[organ] = 2 * both / (first + second) if first + second else math.nan
    return dice


def refuse_mean(labels: Mapping[int, str]) -> None:
    """Refuse an organ whose name is that of the mean over organs.

    Raises:
        InputError: it is called ``mean``.
    """
    if "mean" in labels.values():
        raise InputError("An organ is called 'mean', which is the name of the mean over organs: rename it in --labels.")


def agreement(
    copies: Sequence[np.ndarray], *, labels: Mapping[int, str], holds: Sequence[Collection[int]]
) -> dict[str, float]:
    """Return the mean Dice between the copies of each organ, over all pairs whose labelled scans both hold it.

    Args:
        copies: (X, Y, Z) for each labelled scan, carried to one scan; `IGNORE` means no answer.
        labels: organ name of each label value.
        holds: label values that occur in each labelled scan's own label map.

    Returns:
        Agreement by organ, and its mean over organs under ``mean``. NaN where fewer than two labelled scans hold the
        organ, or no copy has it in the field of view that two share.

    Raises:
        InputError: lengths or shapes differ, or an organ is called ``mean``.
    """
    if len(copies) != len(holds):
        raise InputError(f"{len(copies)} copies, but the classes of {len(holds)} labelled scans: give one for each.")
    refuse_mean(labels)
    found: dict[str, list[float]] = {organ: [] for organ in labels.values()}
    for (one, its), (other, others) in combinations(zip(copies, holds, strict=True), 2):
        scores = dice_of_organs(one, other, labels=labels)
        for value, organ in labels.items():
            if value in its and value in others and not math.isnan(scores[organ]):
                found[organ].append(scores[organ])
    means = {organ: float(np.mean(values)) if values else math.nan for organ, values in found.items()}
    known = [value for value in means.values() if not math.isnan(value)]
    return {**means, "mean": float(np.mean(known)) if known else math.nan}


def expected_volumes(
    volumes: Sequence[Mapping[str, float]], scales: Sequence[Sequence[float]]
) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest volume that a scan's organs should have, going by the labelled scans.

    Args:
        volumes: ml of each organ in each labelled scan; 0, or no entry, if it lacks the organ.
        scales: (x, y, z) of each pair, as `register` takes it: a length in the scan, times the scale, is one in the
            labelled scan, so that volumes are divided by their product.

    Returns:
        ``(lowest, highest)`` in ml for each organ that a labelled scan holds.

    Raises:
        InputError: lengths differ, or a scale is not above 0.
    """
    if len(volumes) != len(scales):
        raise InputError(f"{len(volumes)} labelled scans, but {len(scales)} scales: give one for each.")
    found: dict[str, list[float]] = {}
    for own, scale in zip(volumes, scales, strict=True):
        if len(scale) != 3 or not all(is_number(float(value)) and value > 0 for value in scale):
            raise InputError(f"scale is {list(scale)}: it must be three numbers above 0.")
        for organ, millilitres in own.items():
            if millilitres > 0:
                found.setdefault(organ, []).append(millilitres / float(np.prod(scale)))
    return {organ: (min(values), max(values)) for organ, values in found.items()}


VOLUME_RATIO = Rule(
    "must be a number from 0 to 1, then one of 1 or more",
    lambda value: is_list(value, 2) and 0 <= value[0] <= 1 <= value[1],
)


@dataclass(frozen=True)
class Limits:
    """What a carried organ must meet to be kept.

    Attributes:
        min_agreement: Dice between copies, for an organ that two or more labelled scans hold.
        min_confidence: mean confidence of the organ's voxels, for an organ that only one labelled scan holds.
        volume_ratio: least and largest volume, as a share of the smallest and of the largest expected volume.
    """

    min_agreement: float = 0.6
    min_confidence: float = 0.3
    volume_ratio: Sequence[float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        SHARE.check("min_agreement", self.min_agreement)
        SHARE.check("min_confidence", self.min_confidence)
        VOLUME_RATIO.check("volume_ratio", self.volume_ratio)


@dataclass(frozen=True)
class Decision:
    """Whether the label of one organ in one scan is kept.

    Attributes:
        scan: name of the scan.
        organ: name of the organ.
        kept: False: the organ's voxels must become `IGNORE`, not background.
        reason: why, in words, with the numbers.
        agreement: Dice between copies; NaN with fewer than two.
        confidence: mean over the organ's voxels; NaN without voxels.
        volume: ml.
    """

    scan: str
    organ: str
    kept: bool
    reason: str
    agreement: float
    confidence: float
    volume: float


def decide(
    scan: str,
    *,
    agreements: Mapping[str, float],
    confidences: Mapping[str, float],
    volumes: Mapping[str, float],
    expected: Mapping[str, tuple[float, float]],
    limits: Limits,
) -> list[Decision]:
    """Decide for every organ of a scan whether its fused label is kept.

    Args:
        scan: name of the scan, for the table.
        agreements: from `agreement`; the entry ``mean`` is not an organ.
        confidences: mean confidence of each organ's voxels in the fused label.
        volumes: ml of each organ in the fused label.
        expected: from `expected_volumes`.
        limits: the thresholds.

    Returns:
        One decision per organ, in the order of ``agreements``.
    """
    decisions = []
    for organ, agreed in agreements.items():
        if organ == "mean":
            continue
        confidence, volume = confidences.get(organ, math.nan), volumes.get(organ, 0.0)
        kept, reason = _judge(organ, agreed, confidence, volume, expected, limits)
        decisions.append(Decision(scan, organ, kept, reason, agreed, confidence, volume))
    return decisions


def _judge(
    organ: str,
    agreed: float,
    confidence: float,
    volume: float,
    expected: Mapping[str, tuple[float, float]],
    limits: Limits,
) -> tuple[bool, str]:
    if organ not in expected:
        return False, "no labelled scan holds it"
    if volume <= 0:
        return False, "no voxel of it is left: it is outside of this scan, or other classes have more votes everywhere"
    if math.isnan(agreed):
        if not confidence >= limits.min_confidence:
            return False, f"one copy only, and its confidence is {confidence:.2f}, below {limits.min_confidence:.2f}"
        good = f"one copy only, with confidence {confidence:.2f}"
    elif agreed < limits.min_agreement:
        return False, f"the copies agree by Dice {agreed:.2f}, below {limits.min_agreement:.2f}"
    else:
        good = f"the copies agree by Dice {agreed:.2f}"
    lowest, highest = expected[organ][0] * limits.volume_ratio[0], expected[organ][1] * limits.volume_ratio[1]
    if not lowest <= volume <= highest:
        return False, f"it has {volume:.1f} ml, and {lowest:.1f} to {highest:.1f} ml are plausible; {good}"
    return True, f"{good}, and {volume:.1f} ml are between {lowest:.1f} and {highest:.1f} ml"


def keep_only(label: np.ndarray, decisions: Sequence[Decision], *, labels: Mapping[int, str]) -> np.ndarray:
    """Return a fused label map in which the voxels of organs that are not kept are `IGNORE`.

    Args:
        label: uint8 (X, Y, Z).
        decisions: the decisions of its scan.
        labels: organ name of each label value.

    Raises:
        InputError: an organ in the label map has no decision.
    """
    kept = {decision.organ: decision.kept for decision in decisions}
    result = label.copy()
    for value in np.unique(label).tolist():
        if value in (0, IGNORE):
            continue
        if labels.get(value) not in kept:
            raise InputError(f"Label {value} ({labels.get(value, 'without a name')}) has no decision: decide it first.")
        if not kept[labels[value]]:
            result[label == value] = IGNORE
    return result


@dataclass(frozen=True)
class LeftOut:
    """One organ of a labelled scan to which the other labelled scans carried their labels.

    Attributes:
        scan: name of the labelled scan.
        organ: name of the organ.
        agreement: Dice between the copies; NaN with fewer than two.
        dice: Dice of the fused label with the scan's own label.
    """

    scan: str
    organ: str
    agreement: float
    dice: float


@dataclass(frozen=True)
class Relation:
    """How agreement and true Dice are related.

    Attributes:
        pairs: number of organs with both.
        rank_correlation: Spearman's; NaN with fewer than three, or if one of both is constant.
        min_agreement: smallest agreement at or above which the organs have the wanted Dice on average; NaN if none has.
    """

    pairs: int
    rank_correlation: float
    min_agreement: float


def relation(rows: Sequence[LeftOut], *, dice: float) -> Relation:
    """Return how well agreement predicts the true Dice, and which agreement gives a wanted Dice on average.

    Args:
        rows: rows without agreement are left out.
        dice: wanted mean Dice of the organs that are kept.
    """
    known = [(row.agreement, row.dice) for row in rows if not math.isnan(row.agreement)]
    agreed, true = np.array(known).reshape(-1, 2).T
    varied = len(known) > 2 and np.ptp(agreed) > 0 and np.ptp(true) > 0
    correlation = float(spearmanr(agreed, true).statistic) if varied else math.nan
    enough = [limit for limit in sorted(set(agreed.tolist())) if true[agreed >= limit].mean() >= dice]
    return Relation(len(known), correlation, enough[0] if enough else math.nan)
