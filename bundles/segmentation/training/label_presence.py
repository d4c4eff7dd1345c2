# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check that every structure occurs in the training labels: a network cannot learn one that does not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np

from ...common.data.label_values import whole_labels
from ...common.data.partial_labels import shown_classes
from ...common.errors import InputError
from ...common.run.distributed import rank
from ...common.scans.nifti import open_scan, stored_voxels
from ...common.words import counted
from ...common.words import shown as shown_as_text

logger = logging.getLogger(__name__)


#: Voxels, at the training's spacing, from which on resampling is sure to keep a structure.
SAFE_SIZE = 64


def label_volumes(scans: Sequence[Mapping[str, str]], *, classes: int, ignore_label: int | None = None) -> np.ndarray:
    """Return the volume of each class in each label file, in mm^3.

    Args:
        scans: items with ``label`` files of whole numbers.
        classes: number of classes, background included. Larger values are not counted.
        ignore_label: value of unknown voxels; adds a last column with their volume. None: no such column.

    Returns:
        float64 (scans, classes), or (scans, classes + 1) with ``ignore_label``.
    """
    values = [*range(classes), *([] if ignore_label is None else [ignore_label])]

    def volumes(file: str) -> np.ndarray:
        label, spacing = _read(file)
        return _counts(label, max(values) + 1)[values] * float(np.prod(spacing))

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lambda item: volumes(item["label"]), scans)))


def resampled_away(scans: Sequence[Mapping[str, str]], *, volumes: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return which structures of which labels have no voxel left after turning to RAS and nearest-neighbour resampling.

    Only labels with a structure below `SAFE_SIZE` voxels of the new spacing are read.

    Args:
        scans: items with ``label`` files of whole numbers.
        volumes: (scans, classes), see `label_volumes`.
        spacing: that of the training, mm along R, A, S.

    Returns:
        bool (scans, classes).
    """

    def lost(scan: Mapping[str, str], present: np.ndarray) -> np.ndarray:
        small = (present > 0) & (present < SAFE_SIZE * np.prod(spacing))
        small[0] = False
        if not small.any():
            return small
        label, sizes = _read(scan["label"])
        # As MONAI's Spacing: the first voxels coincide, and their centres keep the extent.
        taken = [
            np.rint(np.arange(round((count - 1) * size / new + 1)) * new / size).astype(int).clip(max=count - 1)
            for count, size, new in zip(label.shape, sizes, spacing, strict=True)
        ]
        return small & (_counts(label[np.ix_(*taken)], len(present))[: len(present)] == 0)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lost, scans, volumes)))


def _read(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a label map in RAS, and its spacing in mm."""
    scan = open_scan(file)
    raw, slope, inter = stored_voxels(scan)
    label = whole_labels(raw if (slope, inter) == (1.0, 0.0) else raw * slope + inter)
    orientation = nib.io_orientation(scan.affine)
    order = np.argsort(orientation[:, 0])
    return nib.apply_orientation(label, orientation), nib.affines.voxel_sizes(scan.affine)[order]


def _counts(label: np.ndarray, number: int) -> np.ndarray:
    return np.bincount(label.astype(np.int64).ravel(), minlength=number)


def check_label_presence(
    *,
    scans: Sequence[Mapping[str, str]],
    labels: Mapping[str, str],
    ignore_label: int | None = None,
    spacing: Sequence[float] | None = None,
) -> None:
    """Warn about structures that no training label shows as it should, or that resampling loses. Runs on rank 0 only.

    Args:
        scans: training items with ``label`` files; those with ``labelled`` show only these structures.
        labels: label names of this run by value.
        ignore_label: value of unknown voxels, or None.
        spacing: that of the training, mm along R, A, S; None: the labels are not resampled.

    Raises:
        InputError: there is no training item, the labels contain only background, or a label has no known voxel.
    """
    if rank() > 0:
        return
    if not scans:
        raise InputError(
            "There is no labelled training scan: list some under 'training', or in MONAI Label store a label first."
        )
    volumes = label_volumes(scans, classes=len(labels), ignore_label=ignore_label)
    if ignore_label is not None:
        volumes, unknown = volumes[:, :-1], volumes[:, -1]
        _report_unknown(scans, volumes, unknown, ignore_label)
    names = {int(value): name for value, name in labels.items()}
    shown = np.stack([shown_classes(scan, classes=len(labels)).numpy() for scan in scans])
    _report_partial(scans, volumes, shown, names)
    cases, of = ((volumes > 0) & shown).sum(axis=0), shown.sum(axis=0)
    absent = [names[value] for value in range(1, len(labels)) if cases[value] == 0]
    if len(absent) == len(labels) - 1:
        raise InputError(
            f"The labels of all {len(scans)} training cases contain only background, such as {scans[0]['label']}: "
            f"there is nothing to learn. Declared labels: {shown_as_text(labels)}."
        )
    if absent:
        logger.warning(
            "no training case contains %s, so the network cannot learn it. Add cases that contain it, or remove it from --labels.",
            ", ".join(absent),
        )
    few = [
        f"{names[value]} ({cases[value]}{'' if of[value] == len(scans) else f' of {of[value]} that show it'})"
        for value in range(1, len(labels))
        if 0 < cases[value] < of[value]
    ]
    if few:
        logger.info("not all of the %d training cases contain %s", len(scans), ", ".join(few))
    if spacing is not None:
        _report_lost(scans, volumes, cases, names, spacing)


def check_validation_presence(
    *, scans: Sequence[Mapping[str, str]], labels: Mapping[str, str], ignore_label: int | None = None
) -> None:
    """Name structures that no validation label holds, since no score shows how they are learnt. Runs on rank 0 only.

    Args:
        scans: validation items with ``label`` files; none: there is no validation.
        labels: label names of this run by value.
        ignore_label: value of unknown voxels, or None.

    Raises:
        InputError: the validation labels hold no structure at all: every score would be the same.
    """
    if rank() > 0 or not scans:
        return
    volumes = label_volumes(scans, classes=len(labels), ignore_label=ignore_label)[:, : len(labels)]
    shown = np.stack([shown_classes(scan, classes=len(labels)).numpy() for scan in scans])
    held = ((volumes > 0) & shown).any(axis=0)
    names = [str(labels[str(value)] if str(value) in labels else labels[value]) for value in range(1, len(labels))]
    absent = [name for name, found in zip(names, held[1:], strict=True) if not found]
    if len(absent) == len(names):
        raise InputError(
            f"The labels of all {len(scans)} validation cases hold no structure, such as {scans[0]['label']}: no score "
            "could choose the best weights. Choose other validation cases or another --fold, or train without: --fold all."
        )
    if absent:
        logger.warning(
            "no validation case contains %s: mean_dice does not tell how well the network learns it", ", ".join(absent)
        )


def _report_lost(
    scans: Sequence[Mapping[str, str]],
    volumes: np.ndarray,
    cases: np.ndarray,
    names: Mapping[int, str],
    spacing: Sequence[float],
) -> None:
    lost = resampled_away(scans, volumes=volumes, spacing=spacing)
    for value in np.flatnonzero(lost.any(axis=0)).tolist():
        where = np.flatnonzero(lost[:, value])
        logger.warning(
            "%s is so small in %d of its %d training cases that no voxel of it is left at a spacing of %s mm, such as in "
            "%s (%.3g mm^3): %s. Choose a finer --spacing, or remove it from --labels.",
            *(names[value], len(where), cases[value], " x ".join(f"{size:g}" for size in spacing)),
            *(scans[where[0]]["label"], volumes[where[0], value]),
            "the network cannot learn it" if len(where) == cases[value] else "the network does not learn it there",
        )


def _report_partial(
    scans: Sequence[Mapping[str, str]], volumes: np.ndarray, shown: np.ndarray, names: Mapping[int, str]
) -> None:
    partial = ~shown.all(axis=1)
    if not partial.any():
        return
    logger.info(
        "%d of the %d training cases show some structures only. Cases that show each: %s",
        *(partial.sum(), len(scans)),
        ", ".join(f"{names[value]} {number}" for value, number in enumerate(shown.sum(axis=0)) if value),
    )
    undeclared = (volumes > 0) & ~shown
    for case in np.flatnonzero(undeclared.any(axis=1))[:1]:
        logger.warning(
            "%s contains %s, which its entry does not name under 'labelled': there it counts as background or any other "
            "structure. Name it, if all of it is labelled. Cases of this kind: %s.",
            *(scans[case]["label"], ", ".join(names[value] for value in np.flatnonzero(undeclared[case]))),
            ", ".join(f"{names[value]} {number}" for value, number in enumerate(undeclared.sum(axis=0)) if number),
        )


def _report_unknown(
    scans: Sequence[Mapping[str, str]], volumes: np.ndarray, unknown: np.ndarray, ignore_label: int
) -> None:
    if not unknown.any():
        return
    partly = unknown > 0
    for scan in (scan for scan, known in zip(scans, volumes.any(axis=1), strict=True) if not known):
        raise InputError(
            f"{scan['label']} has no known voxel: all are {ignore_label}. Remove its entry from the data list."
        )
    share = unknown[partly] / (unknown + volumes.sum(axis=1))[partly]
    logger.info(
        "%d of the %d training cases have unknown voxels (value %d): %.0f%% of these scans on average. They count in no "
        "loss.",
        *(partly.sum(), len(scans), ignore_label, 100 * share.mean()),
    )
    suspects = [
        scan["label"]
        for scan, some, found in zip(scans, partly, volumes[:, 1:].any(axis=1), strict=True)
        if some and not found
    ]
    if suspects:
        logger.warning(
            "%s no structure, such as %s. If %d marks a structure there, it is not learnt: give it its own value.",
            counted(len(suspects), "label with unknown voxels contains", "labels with unknown voxels contain"),
            *(suspects[0], ignore_label),
        )
