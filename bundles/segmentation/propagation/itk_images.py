# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""SimpleITK, imported where it is used, and scans as its images: RAS becomes LPS, (X, Y, Z) becomes (Z, Y, X).

The rest of the project is in RAS (right, anterior, superior). ITK is in LPS: x and y have the other sign.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ...common.data.label_values import whole_labels
from ...common.errors import InputError, RefusedScan
from ...common.extras import import_extra
from ...common.scans.meta_image import SUFFIXES as METAIMAGE
from ...common.scans.reading import Volume, read_scan
from ...common.scans.search import Candidate

if TYPE_CHECKING:
    import SimpleITK

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse: also from LPS to RAS


def simple_itk() -> ModuleType:
    """Return the module SimpleITK, which only the propagation of labels needs.

    Raises:
        InputError: it is not installed.
    """
    return import_extra("SimpleITK", extra="register", use="Registration")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let every filter that is made inside run in one thread, whatever the machine or the environment says.

    Mattes mutual information is a sum over threads: with another number of them its last bits differ, and the optimiser
    passes that on. Filters keep the number that holds when they are made, so make them inside.
    """
    process = simple_itk().ProcessObject
    before = process.GetGlobalDefaultNumberOfThreads()
    process.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        process.SetGlobalDefaultNumberOfThreads(before)


def as_volume(scan: Volume | str | os.PathLike) -> Volume:
    """Return a scan that may be a NIfTI or MetaImage file, read as all workflows read scans.

    Raises:
        InputError: the file cannot be read, or is not one volume with a usable grid.
    """
    if isinstance(scan, Volume):
        return scan
    path = os.fspath(scan)
    kind = "metaimage" if path.lower().endswith(tuple(METAIMAGE)) else "nifti"
    try:
        return read_scan(Candidate(name=os.path.basename(path), source=path, kind=kind, files=(path,)))
    except RefusedScan as error:
        raise InputError(f"{path} {error}") from error


def as_label(label: Volume | str | os.PathLike) -> Volume:
    """Return a label, read like a scan; values are whole numbers again where software has stored 1.0000001.

    Raises:
        InputError: see `as_volume`.
    """
    volume = as_volume(label)
    return Volume(whole_labels(volume.voxels), volume.affine)


def to_image(volume: Volume) -> SimpleITK.Image:
    """Return a scan as an image in LPS. Oblique, flipped and sheared grids stay as they are: nothing is resampled."""
    # GetImageFromArray takes (Z, Y, X) and copies it in that order.
    image = simple_itk().GetImageFromArray(np.ascontiguousarray(volume.voxels.T))
    affine = TO_LPS @ np.asarray(volume.affine, dtype=float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


def to_volume(image: SimpleITK.Image) -> Volume:
    """Return an image in LPS as a scan in RAS; the inverse of `to_image`."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Volume(simple_itk().GetArrayFromImage(image).T, TO_LPS @ affine)


def to_lps(matrix: np.ndarray) -> np.ndarray:
    """Return a (4, 4) map between points in mm in RAS as the same map in LPS. It is its own inverse."""
    return TO_LPS @ matrix @ TO_LPS
