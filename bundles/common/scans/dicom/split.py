# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Separate the volumes that one DICOM series mixes, but only where the positions of the slices confirm it.

Other tags can change within a volume. If they split a series, every second slice or half of a scan could pass for a
volume.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..slice_grid import MAX_SHIFT, MIN_SLICES, SAME_PLACE

logger = logging.getLogger(__name__)

# Attributes that distinguish acquisitions, then reconstructions of one acquisition; the first that sorts them counts.
ATTRIBUTES = (
    *("AcquisitionNumber", "ConvolutionKernel", "ReconstructionDiameter", "ImageType", "SeriesNumber"),
    *("PixelSpacing", "SliceThickness", "KVP", "TemporalPositionIdentifier", "NominalPercentageOfCardiacPhase"),
    *("FilterType", "ContrastBolusAgent", "SeriesDescription", "AcquisitionDateTime", "AcquisitionTime"),
)
# These separate two stacks even if together they form one even stack, of slices half as far apart.
CERTAIN = ATTRIBUTES[:2]


class Image(NamedTuple):
    """A file of a series, as the grouping sees it. Missing texts are ""."""

    file: str
    texts: tuple[str, ...]  # the text fields of `Series`
    key: tuple  # files with different keys never belong to one stack
    owner: tuple[str, ...]  # patient, study, name and frame of reference
    folder: str
    attributes: tuple[str, ...]  # the values of `ATTRIBUTES`
    directions: np.ndarray | None
    position: np.ndarray | None
    instance: tuple  # equal for copies
    named: bool  # has a valid SOPInstanceUID


def join_single_images(images: list[Image]) -> list[Image]:
    """Give one key to the images of a folder, patient and name that each have their own SeriesInstanceUID.

    Careless anonymisers write a new UID into each file. None of these images is a volume by itself. When they are read,
    their positions decide whether they form one together. This is not done if the folder has a series of several such
    images.
    """

    def whose(one: Image) -> tuple:
        return one.folder, one.owner[0], one.owner[2]  # folder, patient and name

    counts = Counter((whose(one), one.key) for one in images)
    groups: dict[tuple, list[Image]] = defaultdict(list)
    for one in images:
        if one.texts[0]:
            groups[(*whose(one), *one.key[1:])].append(one)
    joined: dict[str, Image] = {}
    for group, members in groups.items():
        single = all(counts[whose(one), one.key] == 1 and one.position is not None for one in members)
        if single and len(members) >= MIN_SLICES:
            joined |= {one.file: one._replace(key=("", *group)) for one in members}
            logger.warning(
                "%s: %d images have a SeriesInstanceUID of their own each, as some anonymisers write it: they are read as "
                "one volume if their positions form one.",
                *(members[0].folder, len(members)),
            )
    return [joined.get(one.file, one) for one in images]


def split_stack(stack: list[Image]) -> list[list[Image]]:
    """Split files of one SeriesInstanceUID, size and orientation if they are clearly several volumes.

    - By owner, since some anonymisers write one UID into all series; but not if files of one folder together form one
      evenly spaced stack, whose halves would pass as volumes, except if its slices alternate between two even stacks of
      two frames of reference. Owners that share no folder are always split.
    - By acquisition, kernel or another of `ATTRIBUTES` if each part is an evenly spaced stack, the parts overlap, and
      the whole is not an evenly spaced stack. An evenly spaced whole is split only by acquisition and kernel: of two
      scans half a slice apart, each is complete. Blocks of a scan one after the other stay together, except if they
      have different spacings.
    - By ImageType if the files of each value have the same positions, as those of two reconstructions.

    Files without positions (multi-frame images) are split by owner and ImageType.
    """
    owners = _parts(stack, [one.owner for one in stack])
    if len(owners) > 1 and _is_even(_heights(stack)):
        owners = _joined_by_folder(owners) if not _are_woven(owners) else owners
    if len(owners) > 1:
        return [part for owner in owners for part in split_stack(owner)]
    by_type = _parts(stack, _values(stack, "ImageType"))
    heights = [_heights(part) for part in by_type]
    if all(one is None for one in heights):
        return by_type
    volumes = _volumes(stack, ATTRIBUTES)
    if volumes:
        return volumes
    _warn_of_woven(stack)
    once = all(one is not None and (np.diff(one) >= SAME_PLACE).all() for one in heights)
    if once and all(len(one) == len(heights[0]) and np.abs(one - heights[0]).max() < SAME_PLACE for one in heights):
        return by_type
    return [stack]


def _are_woven(owners: list[list[Image]]) -> bool:
    """Return whether the stacks of several frames of reference lie between one another, each complete by itself."""
    if len({one.owner[-1] for part in owners for one in part}) != len(owners):
        return False
    whole = all(len(part) >= MIN_SLICES and _is_even(_heights(part)) for part in owners)
    return whole and _are_volumes(owners, even=True)


def _joined_by_folder(owners: list[list[Image]]) -> list[list[Image]]:
    """Join the owners that have files in one folder, directly or through others."""
    joined: list[tuple[set[str], list[Image]]] = []
    for owner in owners:
        folders, files = {one.folder for one in owner}, list(owner)
        apart = []
        for group in joined:
            if group[0].isdisjoint(folders):
                apart.append(group)
            else:
                folders, files = folders | group[0], group[1] + files
        joined = [*apart, (folders, files)]
    return [files for _, files in joined]


def _volumes(stack: list[Image], names: Sequence[str]) -> list[list[Image]] | None:
    """Return the evenly spaced stacks that the attributes separate; None if none does."""
    whole = _heights(stack)
    if whole is None:
        return None
    even = _is_even(whole)
    for name in names:
        if even and name not in CERTAIN:
            continue
        parts = _parts(stack, _values(stack, name))
        if len(parts) == 1 or min(map(len, parts)) < MIN_SLICES or not _are_volumes(parts, even):
            continue
        rest = [other for other in names if other != name]
        found = [_volumes(part, rest) or ([part] if _is_even(_heights(part)) else None) for part in parts]
        if all(found):
            return [volume for volumes in found for volume in volumes]
    return None


def _are_volumes(parts: list[list[Image]], even: bool) -> bool:
    """Return whether parts of a stack lie side by side, and do not follow one another as blocks of one scan."""
    heights = [_heights(part) for part in parts]
    if even:  # then the slices of one part lie between those of another
        return any(max(one[0], other[0]) < min(one[-1], other[-1]) for one, other in combinations(heights, 2))
    beside = any(
        max(one[0], other[0]) <= min(one[-1], other[-1]) + SAME_PLACE for one, other in combinations(heights, 2)
    )
    gaps = [np.median(np.diff(one)) for one in heights]
    return beside or max(gaps) - min(gaps) > MAX_SHIFT


def _warn_of_woven(stack: list[Image]) -> None:
    """Warn if an attribute that does not split an even stack separates even stacks whose slices alternate."""
    for name in ATTRIBUTES if _is_even(_heights(stack)) else ():
        parts = _parts(stack, _values(stack, name))
        if len(parts) == 1 or min(map(len, parts)) < MIN_SLICES or not all(_is_even(_heights(part)) for part in parts):
            continue
        if _are_volumes(parts, even=True):
            logger.warning(
                "%s: the slices of this series alternate between %d values of %s. They are read as one volume; if they are "
                "several scans, a part of a slice apart, put each into a folder and a series of its own.",
                *(stack[0].folder, len(parts), name),
            )
            return


def _values(stack: list[Image], name: str) -> list[str]:
    index = ATTRIBUTES.index(name)
    return [one.attributes[index] for one in stack]


def _parts(stack: list[Image], values: Sequence[Hashable]) -> list[list[Image]]:
    parts: dict[Hashable, list[Image]] = {}
    for one, value in zip(stack, values, strict=True):
        parts.setdefault(value, []).append(one)
    return list(parts.values())


def _heights(stack: list[Image]) -> np.ndarray | None:
    """Return the sorted positions of the files along the slice normal in mm; None if a file has no position."""
    if stack[0].directions is None or any(one.position is None for one in stack):
        return None
    normal = np.cross(stack[0].directions[:3], stack[0].directions[3:])
    return np.sort([one.position @ normal for one in stack])


def _is_even(heights: np.ndarray | None) -> bool:
    if heights is None or (np.diff(heights) < SAME_PLACE).any():
        return False
    even = np.linspace(heights[0], heights[-1], len(heights))
    return bool(np.abs(heights - even).max() <= MAX_SHIFT)
