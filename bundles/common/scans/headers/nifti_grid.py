# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Decide where the voxels of a NIfTI file lie, which its header states in up to three ways and in several units.

The rules are those of the standard (nifti1.h): the sform counts where its code is above 0, else the qform, and pixdim
by itself if neither has a code. But where the voxels of the sform have another size than pixdim, the qform counts if it
has a code, as in MONAI and ITK. Every disagreement is named, since other programs may decide differently. See
https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import product
from typing import Any

import nibabel as nib
import numpy as np

from ...errors import RefusedScan
from .nifti_bytes import stored_header
from .plausible import IN_MM

UNITS = {code: (name, IN_MM[name]) for code, name in ((1, "metres"), (2, "mm"), (3, "micrometres"))}  # by xyzt_units
SCALE_TOLERANCE = 0.01  # pixdim is often rounded to two or three digits
# Near half a turn, the float32 quaternion of a qform is accurate to 6e-4 radians: 0.3 voxels at the corner of 512^3.
MAX_SHIFT = 0.5  # voxels
SAME_GRID = 0.01  # voxels
# Largest distance between the grids of a scan and its label, or of two channels, in voxels. The origin is stored
# directly, so only decimal rounding moves it; directions may differ by as much as a qform of the same scan.
MAX_ORIGIN_SHIFT = 0.1
MAX_CORNER_SHIFT = MAX_SHIFT
LARGEST_CODE = 5  # largest code of qform and sform: NIFTI_XFORM_TEMPLATE_OTHER
#: Fields of a header that place the voxels.
PLACING = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True)
class Doubt:
    """Something in a header that other programs may read differently; ``kind`` groups equal ones of several files."""

    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels lie.

    Attributes:
        affine: (4, 4), voxel indices to mm in RAS.
        unit: name of the unit that the file states if it is not mm, else "".
        doubts: what other programs may read differently.
    """

    affine: np.ndarray
    unit: str
    doubts: tuple[Doubt, ...]


def grid_of(header: nib.Nifti1Header) -> Grid:
    """Return the grid that a header states.

    Args:
        header: header as stored, with three axes or more; spacings above 0.

    Raises:
        RefusedScan: there is no usable affine, or sform and qform are mirrored or turned against each other.
    """
    name, factor = UNITS.get(int(header["xyzt_units"]) & 7, UNITS[2])  # unknown: mm
    header, doubts = _with_known_codes(header)
    sform = header.get_sform() if header["sform_code"] > 0 else None
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    qform = None
    if header["qform_code"] > 0:
        try:
            qform = header.get_qform()
        except (ValueError, nib.spatialimages.HeaderDataError) as error:
            if sform is None:
                raise RefusedScan(f"has an invalid qform and no sform: {error}") from error
            doubts.append(Doubt("qform", "its qform is invalid; the sform is used"))
    if sform is not None and qform is not None and _is_flat(sform):
        doubts.append(Doubt("sform", f"its sform is invalid ({sform[:3].tolist()}); the qform is used"))
        sform = None
    usable = qform is not None and not _is_flat(qform) and np.isfinite(qform).all()
    scaled = sform is not None and np.abs(nib.affines.voxel_sizes(sform) / pixdim - 1).max() > SCALE_TOLERANCE
    affine = next((form for form in (qform if scaled and usable else None, sform, qform) if form is not None), None)
    if affine is None:
        affine = header.get_base_affine()
        doubts.append(
            Doubt(
                "neither",
                "it has neither an sform nor a qform, so that its orientation is not recorded: the first axis is taken to "
                "run to the left, the second to the front, the third to the head; left and right may be swapped",
            )
        )
    elif not np.isfinite(affine).all():
        raise RefusedScan(f"has an affine that is not finite: {affine.tolist()}")
    elif _is_flat(affine):
        raise RefusedScan(f"has an affine whose axes are zero or lie in one plane: {affine.tolist()}")
    if sform is not None:
        if scaled:
            sizes = f"its sform has voxels of {_numbers(nib.affines.voxel_sizes(sform))}, its pixdim says {_numbers(pixdim)}"
            used, other = (
                ("pixdim and qform are used, as by MONAI and ITK", "sform")
                if usable
                else ("the sform is used", "pixdim")
            )
            doubts.append(
                Doubt(
                    "spacing",
                    f"{sizes}; {used}. If the {other} is right, all volumes will be wrong: correct the header",
                )
            )
        if qform is not None:
            doubts += _disagreement(sform, qform, header.get_data_shape()[:3], scaled)
    if factor != 1:
        doubts.append(
            Doubt(
                "unit",
                f"its unit is {name}: voxels of {_numbers(nib.affines.voxel_sizes(affine))} {name} are read as "
                f"{_numbers(nib.affines.voxel_sizes(affine) * factor)} mm",
            )
        )
    return Grid(np.diag([factor, factor, factor, 1.0]) @ affine, name if factor != 1 else "", tuple(doubts))


def placing_fields(file: str | os.PathLike, *, shape: tuple[int, ...], affine: np.ndarray) -> dict[str, Any]:
    """Return the fields of a file's header that place its voxels, if a grid is that of the file; else nothing.

    A mask that carries them lies on the scan in every program, whichever of the forms the program uses.

    Args:
        file: a NIfTI file; anything else gives nothing.
        shape: (X, Y, Z) of the grid.
        affine: (4, 4) of the grid, voxel indices to mm in RAS.
    """
    try:
        header = stored_header(file)
        if len(header.get_data_shape()) < 3:
            return {}
        header, _ = _with_known_codes(header)
        grid = grid_of(header)
        as_stored = (
            np.diag([*[UNITS.get(int(header["xyzt_units"]) & 7, UNITS[2])[1]] * 3, 1.0]) @ header.get_best_affine()
        )
    except Exception:  # a source that is gone, in another format or damaged: the mask keeps its own header
        return {}
    readable = np.allclose(as_stored, grid.affine) or any(doubt.kind == "spacing" for doubt in grid.doubts)
    if header.get_data_shape()[:3] != tuple(shape[:3]) or not readable:
        return {}
    if corner_shift(affine, grid.affine, shape[:3]).max() > SAME_GRID:
        return {}
    return {name: header[name].copy() for name in PLACING}


def _with_known_codes(header: nib.Nifti1Header) -> tuple[nib.Nifti1Header, list[Doubt]]:
    """Return a header whose codes are those of the standard, and the reason to doubt it if they were not.

    A code below 0 counts as 0, as in all programs. One above `LARGEST_CODE` counts as 0 in nibabel and in what uses it,
    as 1 in ITK. Here it counts as 1 if neither form has a valid code. A qfac (``pixdim[0]``) that is neither 1 nor -1
    is 1, says the standard.
    """
    known, doubts = header.copy(), []
    if header["pixdim"][0] not in (1, -1):
        known["pixdim"][0] = 1
    codes = {name: int(header[f"{name}_code"]) for name in ("sform", "qform")}
    valid = {name: code if 0 <= code <= LARGEST_CODE else 0 for name, code in codes.items()}
    wrong = [name for name, code in codes.items() if code > LARGEST_CODE]
    if wrong and not any(valid.values()):
        valid |= dict.fromkeys(wrong, 1)
    for name in codes:
        known[f"{name}_code"] = valid[name]
    if wrong:
        stated = " and ".join(f"{name}_code {codes[name]}" for name in wrong)
        used = "they count" if all(valid[name] for name in wrong) else "it does not count, as in nibabel"
        doubts.append(
            Doubt("code", f"it has {stated}, where the standard knows 0 to {LARGEST_CODE}: {used}. Correct the header")
        )
    return known, doubts


def corner_shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return how far a grid's corners are from those of another, in voxels of the other; (8,), the origin first."""
    corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in shape))]).T
    return np.abs(((np.linalg.inv(other) @ affine - np.eye(4)) @ corners)[:3]).max(axis=0)


def is_aligned(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether two grids of one shape are the same, but for rounding (`MAX_ORIGIN_SHIFT`, `MAX_CORNER_SHIFT`)."""
    shift = corner_shift(affine, other, shape)
    return bool(shift[0] <= MAX_ORIGIN_SHIFT and shift.max() <= MAX_CORNER_SHIFT)


def _disagreement(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, ...], scaled: bool) -> list[Doubt]:
    if _is_flat(qform) or not np.isfinite(qform).all():
        return [Doubt("qform", "its qform is invalid; the sform is used")]
    relative = np.linalg.inv(qform) @ sform
    both = f"sform {''.join(nib.aff2axcodes(sform))} from {_numbers(sform[:3, 3])}, qform {''.join(nib.aff2axcodes(qform))} from {_numbers(qform[:3, 3])}"
    if np.linalg.det(relative[:3, :3]) < 0 or (np.diag(relative)[:3] <= 0).any():
        raise RefusedScan(
            f"has an sform and a qform that are mirrored or turned against each other ({both}): programs differ in which "
            "one they use, and would swap sides. Find out which is right, and set the code of the other to 0"
        )
    shift = corner_shift(sform, qform, shape)
    if scaled or shift.max() <= MAX_SHIFT:
        return []
    distance = np.linalg.norm(sform[:3, 3] - qform[:3, 3])
    return [
        Doubt(
            "forms",
            f"its sform and qform differ by up to {shift.max():.3g} voxels, {distance:.3g} mm at the first voxel ({both}); the "
            "sform is used. The mask carries both, so that it lies on the scan in every program",
        )
    ]


def _is_flat(affine: np.ndarray) -> bool:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) <= 1e-3 * lengths.prod())


def _numbers(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
