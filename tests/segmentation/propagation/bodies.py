# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Synthetic patients on any grid, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bundles.common.scans.reading import Volume
from tools.synthetic_patient import ORGANS, Patient, draw_patient, render


def scan_of(seed: int, *, spacing: tuple[float, float, float] = (8.0, 8.0, 8.0), **changes) -> tuple[Volume, Volume]:
    """Return scan and label map of a patient on a grid of another voxel size; the body stays where it is."""
    patient = draw_patient(seed)
    shape = tuple(int(n) for n in np.round(np.array(patient.shape) * patient.spacing / spacing))
    image, label, affine = render(replace(patient, spacing=spacing, shape=shape, **changes))
    return Volume(image, affine), Volume(label, affine)


def middle(patient: Patient) -> np.ndarray:
    """Return where the origin of the body lies, in RAS mm."""
    return patient.centre + patient.place


def dice(one: np.ndarray, other: np.ndarray) -> dict[int, float]:
    """Return the Dice of every organ that one of both has."""
    found = {}
    for organ in ORGANS:
        first, second = one == organ, other == organ
        if first.any() or second.any():
            found[organ] = 2 * (first & second).sum() / (first.sum() + second.sum())
    return found


def mean_dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean of `dice`."""
    return float(np.mean(list(dice(one, other).values())))
