# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Which structures the training labels hold at all: a network never finds what it has never seen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np

from ...common.errors import InputError
from ...common.run.distributed import rank

logger = logging.getLogger(__name__)


def label_volumes(scans: Sequence[Mapping[str, str]], *, classes: int) -> np.ndarray:
    """Volume of each class in each label file, in mm^3.

    Args:
        scans: items with ``label`` files, whose values are whole numbers.
        classes: number of classes, background included; other values are not counted.

    Returns:
        float64 (scans, classes).
    """

    def volumes(file: str) -> np.ndarray:
        label = nib.load(file)
        counts = np.bincount(np.asarray(label.dataobj).astype(np.int64).ravel(), minlength=classes)
        return counts[:classes] * float(np.prod(label.header.get_zooms()[:3]))

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lambda item: volumes(item["label"]), scans)))


def check_label_presence(*, scans: Sequence[Mapping[str, str]], labels: Mapping[str, str]) -> None:
    """Warn of structures that no training label holds, on rank 0.

    Args:
        scans: training items with ``label`` files.
        labels: value to name, of this run.

    Raises:
        InputError: if there is no training item, or the labels hold background alone: there is nothing to learn.
    """
    if rank() > 0:
        return
    if not scans:
        raise InputError(
            "there is no labelled training scan: list some under 'training', or store a label first (MONAI Label)."
        )
    cases = (label_volumes(scans, classes=len(labels)) > 0).sum(axis=0)
    names = {int(value): name for value, name in labels.items()}
    absent = [names[value] for value in range(1, len(labels)) if cases[value] == 0]
    if len(absent) == len(labels) - 1:
        raise InputError(
            f"the labels of all {len(scans)} training cases are background alone, such as {scans[0]['label']}: there is nothing to learn. "
            f"Declared are {dict(labels)}."
        )
    if absent:
        logger.warning(
            "no training case holds %s: the network will never find it. Add cases that have it, or leave it out of --labels.",
            ", ".join(absent),
        )
    few = [f"{names[value]} ({cases[value]})" for value in range(1, len(labels)) if 0 < cases[value] < len(scans)]
    if few:
        logger.info("of %d training cases, not all hold %s", len(scans), ", ".join(few))
