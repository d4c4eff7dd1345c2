# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compute the voxel grid of a DICOM series from its slices, or report what is wrong with them and where.

A gap that was closed or a tilt that was straightened is visible in no voxel, only in organs of the wrong shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from ..errors import RefusedScan
from .dicom.size import frame_count, whole_number

MIN_SLICES = 3  # fewer have no two gaps to compare; whether a volume is too thin for its purpose is not judged here
# Largest distance of a slice from its place on the grid, in mm. Positions rounded to 0.1 mm, as in some archives, are
# off by half of that; the smallest pixels of body CT are about 0.5 mm.
MAX_SHIFT = 0.1
# Largest angle between slice normal and stacking direction, in degrees. Tilted gantries start near 0.5 degrees; cosines
# and positions rounded to three decimals stay below 0.1.
MAX_TILT = 0.1
LARGEST_TILT = 35.0  # degrees; gantries tilt by 30 at most
SAME_PLACE = 0.01  # mm along the normal; CT slices are 0.2 mm apart or more
# Tolerance of direction cosines between slices: 0.05 mm at the far side of a 500 mm image. Most have 6 decimals.
COSINE_TOLERANCE = 1e-4
# Tolerance of the length and the right angle of the cosines of one slice: cosines with three decimals pass.
ORTHONORMAL_TOLERANCE = 1e-3
SPACING_TOLERANCE = 1e-4  # mm between the pixel spacings of slices: 0.05 mm over 512 pixels


class Slice(NamedTuple):
    """One image plane: its file and its position in space (mm, LPS)."""

    file: str
    frame: int  # 0 unless the file is a multi-frame image
    shape: tuple[int, int]  # columns, rows
    position: np.ndarray  # position of the first voxel
    directions: np.ndarray  # (2, 3): along X (a row), along Y (a column)
    spacing: np.ndarray  # mm along X and Y


def sort_slices(headers: Mapping[str, Dataset]) -> list[Slice]:
    """Return the image planes of files and of frames, sorted along row direction x column direction.

    Raises:
        RefusedScan: a plane has no position in space, or the planes differ in size, spacing or orientation.
    """
    slices = [
        _slice(file, header, frame)
        for file, header in headers.items()
        for frame in range(frame_count(header, Path(file).name))
    ]
    first = slices[0]
    for one in slices:
        name = f"{Path(one.file).name} differs from {Path(first.file).name}"
        if one.shape != first.shape:
            raise RefusedScan(f"{name} in size ({one.shape} and {first.shape} voxels): split them into two series")
        if not np.allclose(one.spacing, first.spacing, rtol=0, atol=SPACING_TOLERANCE):
            raise RefusedScan(
                f"{name} in pixel spacing ({_mm(one.spacing)} and {_mm(first.spacing)}): split them into two series"
            )
        if not np.allclose(one.directions, first.directions, rtol=0, atol=COSINE_TOLERANCE):
            raise RefusedScan(
                f"{name} in orientation ({_text(one.directions)} and {_text(first.directions)}): split them into "
                "two series"
            )
    return sorted(slices, key=lambda one: one.position @ _normal(first))


def grid_affine(slices: Sequence[Slice], *, tilted: bool = False) -> np.ndarray:
    """Return the affine (4, 4) of sorted slices, voxel indices (X, Y, Z) to mm in RAS.

    Args:
        slices: as from `sort_slices`.
        tilted: accept slices that are stacked obliquely, by up to `LARGEST_TILT`. The third axis then leans.

    Raises:
        RefusedScan: there are too few slices, two share a position, or they are not evenly stacked at right angles. The
            message says where.
    """
    if len(slices) < MIN_SLICES:
        raise RefusedScan(f"it has {len(slices)} slices, but a grid needs {MIN_SLICES} or more: exclude it")
    first, count = slices[0], len(slices)
    positions = np.array([one.position for one in slices])
    _check_gaps(slices, positions @ _normal(first))

    step = (positions[-1] - positions[0]) / (count - 1)
    tilt, leans = _lean(step, _normal(first), count)
    if leans and (not tilted or tilt > LARGEST_TILT):
        raise RefusedScan(
            f"its slices are stacked obliquely, by {tilt:.1f} degrees (tilted gantry), which a voxel grid cannot "
            "represent: pass --straighten_tilt true (inference.yaml, prepare.yaml), or resample it, e.g. with dcm2niix (the file it names _Tilt) or dicom2nifti (resampling enabled), "
            "and use the NIfTI file"
        )
    shifts = np.linalg.norm(positions - positions[0] - np.arange(count)[:, None] * step, axis=1)
    if shifts.max() > MAX_SHIFT:
        worst = slices[int(shifts.argmax())]
        raise RefusedScan(f"{_place(worst)} is {shifts.max():.2f} mm off the line of the other slices: export it again")

    affine = np.eye(4)
    affine[:3, 0] = first.directions[0] * first.spacing[0]
    affine[:3, 1] = first.directions[1] * first.spacing[1]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # from LPS, which DICOM uses


def is_tilted(affine: np.ndarray, count: int) -> bool:
    """Return whether the third axis of an affine of ``count`` slices leans, by more than rounded positions do."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return _lean(affine[:3, 2], normal / np.linalg.norm(normal), count)[1]


def _lean(step: np.ndarray, normal: np.ndarray, count: int) -> tuple[float, bool]:
    """Return the angle between a step and the normal in degrees, and whether it is more than rounding explains."""
    sideways = np.linalg.norm(step - step @ normal * normal)
    tilt = float(np.degrees(np.arctan2(sideways, abs(step @ normal))))
    return tilt, bool(tilt > MAX_TILT and sideways * (count - 1) > MAX_SHIFT)


def _check_gaps(slices: Sequence[Slice], heights: np.ndarray) -> None:
    """Refuse slices that share a position, are unevenly spaced or missing; ``heights``: sorted mm along the normal."""
    gaps = np.diff(heights)
    if gaps.min() < SAME_PLACE:
        twins = int(gaps.argmin())
        raise RefusedScan(
            f"two of its slices share a position, {_place(slices[twins])} and {_place(slices[twins + 1])} "
            f"({(gaps < SAME_PLACE).sum()} such pairs): several acquisitions or reconstructions in one series. Use "
            "the files of only one"
        )
    even = np.linspace(heights[0], heights[-1], len(heights))
    if np.abs(heights - even).max() <= MAX_SHIFT:
        return
    usual = float(np.median(gaps))
    wide = np.flatnonzero(np.abs(gaps - usual) > 2 * MAX_SHIFT)
    missing = np.rint(gaps[wide] / usual).astype(int) - 1
    whole = np.allclose(gaps[wide], (missing + 1) * usual, rtol=0, atol=2 * MAX_SHIFT)
    if len(wide) and whole and missing.min() > 0:
        where = wide[0]
        raise RefusedScan(
            f"it lacks {missing.sum()} of its slices, the first {missing[0]} between {_place(slices[where])} and "
            f"{_place(slices[where + 1])}: the gap there is {gaps[where]:.2f} mm, the usual one {usual:.2f} mm. Export "
            "the complete series again"
        )
    low, high = int(gaps.argmin()), int(gaps.argmax())
    raise RefusedScan(
        f"its slices are unevenly spaced: {gaps[low]:.2f} mm between {_place(slices[low])} and "
        f"{_place(slices[low + 1])}, but {gaps[high]:.2f} mm between {_place(slices[high])} and "
        f"{_place(slices[high + 1])}. Resample it, e.g. with dcm2niix (the file it names _Eq), and use the NIfTI file"
    )


def _slice(file: str, header: Dataset, frame: int) -> Slice:
    shape = tuple(whole_number(header, keyword, Path(file).name, missing=0) for keyword in ("Columns", "Rows"))
    position = frame_numbers(header, file, frame, "PlanePositionSequence", "ImagePositionPatient", 3)
    directions = frame_numbers(header, file, frame, "PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(
        2, 3
    )
    spacing = frame_numbers(header, file, frame, "PixelMeasuresSequence", "PixelSpacing", 2)[::-1]  # rows come first
    if 0 in shape:
        raise RefusedScan(f"{Path(file).name} has no Rows and Columns: not an image, or truncated; copy the file again")
    if spacing.min() <= 0:
        raise RefusedScan(f"{Path(file).name} has PixelSpacing {_mm(spacing)}, which must be above 0: export it again")
    if not np.allclose(directions @ directions.T, np.eye(2), rtol=0, atol=ORTHONORMAL_TOLERANCE):
        raise RefusedScan(
            f"{Path(file).name} has ImageOrientationPatient {_text(directions)}, not two unit vectors at right "
            "angles: export it again"
        )
    return Slice(file, frame, shape, position, directions, spacing)


def frame_element(header: Dataset, frame: int, group: str, keyword: str) -> Any:
    """Return an element of a frame: from its own functional group, the shared one, or the top level."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for functional in (*own[frame : frame + 1], *shared[:1]):
        for macro in functional.get(group) or []:
            if keyword in macro:
                return macro[keyword].value
    return header.get(keyword)


def frame_numbers(header: Dataset, file: str, frame: int, group: str, keyword: str, count: int) -> np.ndarray:
    """Return `frame_element` as an array of ``count`` numbers.

    Raises:
        RefusedScan: the element is missing or something else.
    """
    value = frame_element(header, frame, group, keyword)
    if value in (None, ""):
        raise RefusedScan(f"{Path(file).name} has no {keyword}: not a slice of a volume, or removed; export it again")
    try:
        found = np.atleast_1d(np.array(value, dtype=float))
    except (TypeError, ValueError):
        found = np.array([])
    if found.shape != (count,) or not np.isfinite(found).all():
        raise RefusedScan(
            f"{Path(file).name} has {keyword} {value}, which is not {'a number' if count == 1 else f'{count} numbers'}: export it again"
        )
    return found


def _normal(one: Slice) -> np.ndarray:
    normal = np.cross(*one.directions)
    return normal / np.linalg.norm(normal)


def _place(one: Slice) -> str:
    frame = f" frame {one.frame + 1}" if one.frame else ""
    return f"{Path(one.file).name}{frame} at {_text(one.position)}"


def _text(numbers: np.ndarray) -> str:
    return "(" + ", ".join(f"{number:.6g}" for number in np.ravel(numbers)) + ")"


def _mm(spacing: np.ndarray) -> str:
    return " x ".join(f"{length:.6g}" for length in spacing) + " mm"
