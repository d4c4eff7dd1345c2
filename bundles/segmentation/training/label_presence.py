# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check that every structure occurs in the training labels: a network cannot learn one that does not."""

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
    """Return the volume of each class in each label file, in mm^3.

    Args:
        scans: items with ``label`` files of whole numbers.
        classes: number of classes, background included. Larger values are not counted.

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
    """Warn about structures that occur in no training label. Runs on rank 0 only.

    Args:
        scans: training items with ``label`` files.
        labels: value to name, of this run.

    Raises:
        InputError: there is no training item, or the labels contain only background.
    """
    if rank() > 0:
        return
    if not scans:
        raise InputError(
            "There is no labelled training scan: list some under 'training', or in MONAI Label store a label first."
        )
    cases = (label_volumes(scans, classes=len(labels)) > 0).sum(axis=0)
    names = {int(value): name for value, name in labels.items()}
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
    few = [f"{names[value]} ({cases[value]})" for value in range(1, len(labels)) if 0 < cases[value] < len(scans)]
    if few:
        logger.info("not all of the %d training cases contain %s", len(scans), ", ".join(few))
