# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The scans that benchmarks read: generated ones, or the user's; and their copies in the patch store."""

from __future__ import annotations

import os
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from torch.nn import functional as F

from bundles.common.data.data_list import unlabelled_scans
from bundles.common.errors import InputError
from bundles.common.scans.search import Candidate
from bundles.pretraining.preparation.audit import USED
from bundles.pretraining.preparation.one_scan import Outputs, Recipe, Task, prepare_scan

from .ways import FOREGROUND_HU

ELLIPSOID = (0.8, 0.55, 1.5)  # body axes relative to the scan; above 1: cut off at the top and the bottom
BLOB = 24  # voxels between the random values that the texture of a generated scan is interpolated from


def make_scan(
    path: str | os.PathLike,
    *,
    shape: Sequence[int],
    seed: int,
    spacing: Sequence[float] = (0.8, 0.8, 1.0),
    ellipsoid: Sequence[float] = ELLIPSOID,
) -> None:
    """Write a synthetic CT in scanner orientation (LPS): an ellipsoid of textured tissue in noisy air, int16.

    It compresses about as well as a real scan, which is what the benchmark depends on.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, *(size // BLOB + 2 for size in shape), generator=generator)
    texture = F.interpolate(coarse, size=tuple(shape), mode="trilinear")[0, 0]
    distance = torch.zeros(1, 1, 1)  # squared, from the centre; 1 on the surface
    for axis, (size, part) in enumerate(zip(shape, ellipsoid, strict=True)):
        positions = torch.linspace(-1, 1, size) / part
        distance = distance + (positions**2).reshape([-1 if other == axis else 1 for other in range(3)])
    noise = torch.randn(tuple(shape), generator=generator)
    hu = torch.where(distance <= 1, 40 + 60 * texture + 12 * noise, -1000 + 6 * noise)
    image = nib.Nifti1Image(hu.round().to(torch.int16).numpy(), np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
    nib.save(image, path)


def find_scans(sources: Sequence[str], most: int) -> list[str]:
    """Find the NIfTI files of folders or data lists; if there are more than ``most``, pick evenly spaced ones.

    Raises:
        InputError: see `unlabelled_scans`; or a scan consists of several files.
    """
    found = [item["image"] for item in unlabelled_scans(list(sources), section="all")]
    for image in found:
        if not isinstance(image, str):
            raise InputError(f"{image[0]} is one of {len(image)} files of a scan. Use CT scans with one file each.")
    chosen = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[index] for index in chosen]


def store_scans(scans: Sequence[str], folder: str) -> list[str]:
    """Write the scans in the format of the store, as `prepare` does; return the files.

    Raises:
        InputError: if a scan cannot be used, with the reason.
    """
    recipe = Recipe(
        foreground_hu=FOREGROUND_HU, min_body=1, min_slices=1, max_spacing=1e6, keep_suspect=True, write_nifti=False
    )
    stored = []
    for number, scan in enumerate(scans):
        candidate = Candidate(f"{number:04d}", source=scan, kind="nifti", files=(scan,))
        row = prepare_scan(Task(candidate, recipe, folder))
        if row["verdict"] != USED:
            raise InputError(f"{scan} {row['reason']}. Fix it, or use a folder without it.")
        stored.append(str(Outputs(folder, candidate.name).store))
    return stored
