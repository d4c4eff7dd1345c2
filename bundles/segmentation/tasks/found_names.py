# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a folder without a data list does not say: its label values, and whether its images are CT in HU."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...common.data.list_forms.list_file import image_files
from ...common.errors import InputError, RefusedScan
from ...common.run.distributed import rank
from ...common.scans.hounsfield import doubt_of_hounsfield
from ...common.scans.nifti import open_scan, stored_voxels
from ...common.words import shown

logger = logging.getLogger(__name__)

LOOKED_AT = 8  # scans whose voxels decide whether the images are CT
SAMPLE = 1_000_000  # voxels of each
NEAR = 1e-3  # distance from a whole number up to which a label value is one


def found_names(items: Sequence[Mapping[str, Any]], *, folder: Path, ignore_label: int | None) -> dict[str, Any]:
    """Return ``labels`` and ``modality`` of a folder from its voxels, and say so in a warning.

    Args:
        items: ``{"image": path or list of paths (one for each channel), "label": path}``.
        folder: for the message.
        ignore_label: value of unknown voxels, which is not a label; None: there are none.

    Returns:
        ``{"labels": {"0": "background", "1": "label_1", ...}, "modality": {"0": "CT"}}``; the channels are called
        ``channel_0``, ... unless there is one and its voxels look like HU.

    Raises:
        InputError: a file cannot be read; label values are not whole numbers from 0, or most numbers between them are
            missing.
    """
    with ThreadPoolExecutor(4) as pool:
        of_files = list(pool.map(lambda item: _read(item["label"], _values), items))
    values = sorted(set().union(*of_files) - ({ignore_label} - {None}))
    structures = [value for value in values if value]
    if not structures:
        known = "" if ignore_label is None else f" ({ignore_label} is the value of unknown voxels, see --ignore_label)"
        raise InputError(f"{folder}: the labels hold no structure, only {shown(values)}{known}.")
    if max(structures) > 2 * len(structures):
        raise InputError(
            f"{folder}: its labels hold the values {shown(values)}. They must be 0 for the background, then 1, 2, 3 ... for the "
            "structures: renumber the label files."
        )
    labels = {str(value): f"label_{value}" if value else "background" for value in range(max(structures) + 1)}
    number = len(image_files(items[0]))
    doubt = "several channels" if number > 1 else _doubt(items)
    channels = {str(channel): f"channel_{channel}" for channel in range(number)} if doubt else {"0": "CT"}
    if rank() == 0:
        logger.warning(
            "%s has no dataset.json. Its labels hold the values %s, called %s unless you name all of them, in training, "
            'evaluation and inference: --labels "%s". Its images are taken %s. A dataset.json says both.',
            *(folder, shown(values), ", ".join(list(labels.values())[1:])),
            str({value: f"NAME{value}" if int(value) else name for value, name in labels.items()}).replace(" ", ""),
            f"as intensities without a unit, z-scored ({doubt})"
            if doubt
            else "for CT in HU, as their voxels look like it",
        )
    return {"labels": labels, "modality": channels}


def _values(file: str) -> set[int]:
    raw, slope, inter = stored_voxels(open_scan(file))
    values = np.unique(raw) * slope + inter
    whole = np.round(values)
    if not np.isfinite(values).all() or (np.abs(values - whole) > NEAR).any() or (whole < 0).any():
        shown = ", ".join(f"{value:g}" for value in values[:10]) + (" ..." if len(values) > 10 else "")
        raise RefusedScan(f"is no label map: it holds the values {shown}; labels are whole numbers from 0")
    return {int(value) for value in whole}


def _doubt(items: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why the images do not look like CT in HU, or None."""
    step = max(1, len(items) // LOOKED_AT)
    for item in items[::step][:LOOKED_AT]:
        file = image_files(item)[0]
        if doubt := _read(file, _doubt_of):
            return f"{file}: {doubt}"
    return None


def _doubt_of(file: str) -> str | None:
    raw, slope, inter = stored_voxels(open_scan(file))
    sample = raw.ravel(order="K")[:: max(1, raw.size // SAMPLE)] * slope + inter
    p95, p99_5 = np.quantile(sample, [0.95, 0.995], method="inverted_cdf")
    return doubt_of_hounsfield(float(sample.min()), float(sample.max()), p95=float(p95), p99_5=float(p99_5))


def _read(file: str, measure: Any) -> Any:
    try:
        return measure(file)
    except RefusedScan as error:
        raise InputError(f"{file} {error}") from error
    except Exception as error:  # nibabel, gzip, zlib and numpy raise many types of errors for broken files
        raise InputError(
            f"{file} cannot be read, perhaps damaged or cut short ({type(error).__name__}: {error})"
        ) from error
