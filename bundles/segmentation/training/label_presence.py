# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check that every structure occurs in the training labels: a network cannot learn one that does not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np

from ...common.data.partial_labels import shown_classes
from ...common.errors import InputError
from ...common.run.distributed import rank

logger = logging.getLogger(__name__)


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
        label = nib.load(file)
        counts = np.bincount(np.asarray(label.dataobj).astype(np.int64).ravel(), minlength=max(values) + 1)
        return counts[values] * float(np.prod(label.header.get_zooms()[:3]))

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lambda item: volumes(item["label"]), scans)))


def check_label_presence(
    *, scans: Sequence[Mapping[str, str]], labels: Mapping[str, str], ignore_label: int | None = None
) -> None:
    """Warn about structures that occur in no training label that should show them. Runs on rank 0 only.

    Args:
        scans: training items with ``label`` files; those with ``labelled`` show these structures only.
        labels: value to name, of this run.
        ignore_label: value of unknown voxels, or None.

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
            f"there is nothing to learn. Declared labels: {dict(labels)}."
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
    for case, value in np.argwhere((volumes > 0) & ~shown)[:1]:
        logger.warning(
            "%s contains %s, which its entry does not name under 'labelled': there it counts as background or any other "
            "structure. Name it, if all of it is labelled.",
            *(scans[case]["label"], names[value]),
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
            "%d labels with unknown voxels contain no structure, such as %s. If %d marks a structure there, it is not "
            "learnt: give it its own value.",
            *(len(suspects), suspects[0], ignore_label),
        )
