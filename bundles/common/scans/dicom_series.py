# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read CT series from DICOM files in HU on their true grid, or refuse them with the reason.

pydicom decodes the pixels; `slice_grid` computes the grid by the formula of the DICOM standard. No existing reader
could be used as it is. On synthetic series with evenly spaced slices, all readers placed the voxels correctly (ITK 5.4
rounded HU where slices have different slopes). But MONAI 1.6 and ITK closed missing slices and uneven gaps without an
error, and stacked two slices of one position as if they were neighbours. highdicom 0.28, the most faithful and the only
one to read an Enhanced image correctly, refused these series without saying where the fault is, treated a gantry tilted
by 1.5 degrees as upright, and needed three times the memory. dicom2nifti 2.6 refused them too, and turned that tilt
into a sheared grid.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
)

from ..errors import NoScan, RefusedScan
from .dicom_headers import THREADS, first_line, read_header, read_headers
from .int16_voxels import int16_or_float32
from .slice_grid import MAX_SHIFT, SAME_PLACE, Slice, frame_element, frame_numbers, grid_affine, sort_slices

logger = logging.getLogger(__name__)

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
HU_TYPES = ("", "HU", "HU_MOD", "US")  # accepted RescaleType; many scanners write US ("unspecified") for plain HU
# Largest difference of direction cosines within a stack: 0.6 degrees. Slices that differ by less stay together, and
# `read_series` judges them: if the last decimals split a stack, every second slice could form a volume of its own.
STACK_TOLERANCE = 0.01

_GROUPING_TAGS = [
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "Modality",
    "SeriesDescription",
    "ImageType",
    "Rows",
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
]
# Compared as they are stored: some scanners write values that pydicom refuses to convert.
_UNCONVERTED_TAGS = ["AcquisitionNumber", "InstanceNumber"]


@dataclass(frozen=True)
class Series:
    """One stack of images of a DICOM series, or its objects of another kind. Missing texts are "".

    Attributes:
        files: sorted by name; `read_series` finds the order of the slices.
        series_uid: SeriesInstanceUID. Several stacks can share it, see `find_series`.
        study_uid: StudyInstanceUID.
        patient_id: PatientID.
        modality: ``"CT"``, ``"MR"``, ``"RTSTRUCT"``, ...
        description: SeriesDescription.
    """

    files: tuple[str, ...]
    series_uid: str
    study_uid: str
    patient_id: str
    modality: str
    description: str


@dataclass(frozen=True)
class DicomVolume:
    """A CT series as one array.

    Attributes:
        voxels: HU, shape (X, Y, Z): columns, rows, slices; int16 if all values are whole and fit, else float32.
        affine: (4, 4), voxel indices to mm in RAS, as in nibabel. Z runs along row direction x column direction.
        files: the file of each slice along Z; that of an Enhanced (multi-frame) image is repeated.
    """

    voxels: np.ndarray
    affine: np.ndarray
    files: tuple[str, ...]


def find_series(files: Iterable[str | os.PathLike]) -> tuple[list[Series], dict[str, str]]:
    """Group DICOM files into series by their headers; file names and folders do not matter.

    A series that mixes image sizes, orientations, or localizers and slices is split into one `Series` for each. Other
    tags, such as ImageType and SeriesDescription, can change within a volume. They split a series only if the slice
    positions confirm it, see `_split`. `read_series` refuses mixtures that remain. Copies of a file count once.

    Args:
        files: any files.

    Returns:
        The series, sorted by their first file, and a dict of the files that belong to no series, with the reasons.
    """
    names = sorted({os.fspath(file) for file in files})
    reasons: dict[str, str] = {}
    stacks: dict[tuple, list[list[_Found]]] = {}
    instances: dict[tuple, str] = {}
    copies = []
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(names, pool.map(_find, names), strict=True):
            if isinstance(found, str):
                reasons[name] = found
                continue
            original = instances.setdefault(found.instance, name)
            if original != name:
                copies.append(f"{name} of {original}")
                continue
            groups = stacks.setdefault(found.key, [])
            for members in groups:
                if _same_directions(members[0].directions, found.directions):
                    members.append(found)
                    break
            else:
                groups.append([found])
    if copies:
        logger.info("Skipped %d files that are copies of others, such as %s.", len(copies), copies[0])
    parts = [part for groups in stacks.values() for members in groups for part in _split(members)]
    series = [Series(tuple(one.file for one in part), *part[0].texts) for part in parts]
    return sorted(series, key=lambda one: one.files), reasons


class _Found(NamedTuple):
    file: str
    texts: tuple[str, ...]  # the text fields of `Series`
    key: tuple  # files with different keys never belong to one stack
    owner: tuple[str, str]  # patient and study
    image_type: str
    directions: np.ndarray | None
    position: np.ndarray | None
    instance: tuple


def _find(file: str) -> _Found | str:
    """Return the properties that `find_series` groups a file by, or the reason why it belongs to no series."""
    try:
        header = read_header(file, convert=_GROUPING_TAGS)
    except RefusedScan as reason:
        return str(reason)
    if "SeriesInstanceUID" not in header:
        return "it belongs to no DICOM series (no SeriesInstanceUID): it may be a DICOMDIR, or truncated"
    keywords = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "SeriesDescription")
    texts = tuple(sys.intern(_text(header, keyword)) for keyword in keywords)  # one string for all files that share it
    series, study, patient, modality, _ = texts
    # Some anonymisers write one SOPInstanceUID into all files: a copy must agree in everything else as well.
    rest = [_text(header, keyword) for keyword in ("SOPInstanceUID", "ImageType", "ImagePositionPatient")]
    rest += [_stored_text(header, keyword) for keyword in _UNCONVERTED_TAGS]
    return _Found(
        file=file,
        texts=texts,
        key=(series, modality, _is_localizer(header), _text(header, "Rows"), _text(header, "Columns")),
        owner=(patient, study),
        image_type=_text(header, "ImageType"),
        directions=_numbers(header, "ImageOrientationPatient", 6),
        position=_numbers(header, "ImagePositionPatient", 3),
        instance=(series, study, patient, *rest),
    )


def _split(stack: list[_Found]) -> list[list[_Found]]:
    """Split files of one SeriesInstanceUID, size and orientation if they are clearly several volumes.

    They are split by patient and study, since some anonymisers write one UID into all series; but not if together they
    form one evenly spaced stack, whose halves would pass as volumes. They are split by ImageType only if the files of
    each value have the same positions, as those of two reconstructions. Files without positions (multi-frame images)
    are split by both.
    """
    owners = _parts(stack, "owner")
    if len(owners) > 1 and not _is_even(stack):
        return [part for owner in owners for part in _split(owner)]
    parts = _parts(stack, "image_type")
    heights = [_heights(part) for part in parts]
    if all(one is None for one in heights):
        return parts
    once = all(one is not None and (np.diff(one) >= SAME_PLACE).all() for one in heights)
    if once and all(len(one) == len(heights[0]) and np.abs(one - heights[0]).max() < SAME_PLACE for one in heights):
        return parts
    return [stack]


def _parts(stack: list[_Found], name: str) -> list[list[_Found]]:
    parts: dict[tuple | str, list[_Found]] = {}
    for one in stack:
        parts.setdefault(getattr(one, name), []).append(one)
    return list(parts.values())


def _heights(stack: list[_Found]) -> np.ndarray | None:
    """Return the sorted positions of the files along the slice normal in mm; None if a file has no position."""
    if stack[0].directions is None or any(one.position is None for one in stack):
        return None
    normal = np.cross(stack[0].directions[:3], stack[0].directions[3:])
    return np.sort([one.position @ normal for one in stack])


def _is_even(stack: list[_Found]) -> bool:
    heights = _heights(stack)
    if heights is None or (np.diff(heights) < SAME_PLACE).any():
        return False
    even = np.linspace(heights[0], heights[-1], len(heights))
    return bool(np.abs(heights - even).max() <= MAX_SHIFT)


def _same_directions(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is None and other is None
    return bool(np.allclose(one, other, rtol=0, atol=STACK_TOLERANCE))


def _is_localizer(header: Dataset) -> bool:
    return "LOCALIZER" in (header.get("ImageType") or ())


def _numbers(header: Dataset, keyword: str, count: int) -> np.ndarray | None:
    try:
        found = np.array(header.get(keyword), dtype=float)
    except (TypeError, ValueError):
        return None
    return found if found.shape == (count,) and np.isfinite(found).all() else None


def _stored_text(header: Dataset, keyword: str) -> str:
    """Return a value as it is stored, whether or not pydicom can convert it, or has; "" if it is missing."""
    value = header.get_item(keyword).value if keyword in header else ""
    return value.decode("latin-1").strip("\0 ") if isinstance(value, bytes) else str(value)


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value)


def read_series(series: Series) -> DicomVolume:
    """Read a CT series in HU, with the slices in spatial order.

    HU is the stored value x RescaleSlope + RescaleIntercept of each slice. Padding keeps its value.

    Raises:
        NoScan: they are something else than a CT volume, such as a scout view.
        RefusedScan: the files are not one CT volume of evenly spaced, upright slices, or cannot be decoded.
    """
    if series.modality != "CT":
        kind = NoScan if series.modality else RefusedScan
        raise kind(f"its modality is {series.modality or 'missing'}: only CT is supported")
    headers = read_headers(series.files)
    first = series.files[0]
    for file, header in headers.items():
        _check_kind(Path(file).name, header)
        if _text(header, "PatientID") != _text(headers[first], "PatientID"):
            raise RefusedScan(
                f"{Path(first).name} and {Path(file).name} are of two patients (PatientID), but of one series by their "
                "SeriesInstanceUID and positions: use the files of one patient only, or export the series again"
            )
    slices = sort_slices(headers)
    affine = grid_affine(slices)
    rescale = [_rescale(one, headers[one.file]) for one in slices]

    planes: list[np.ndarray] = []
    opened: dict[str, np.ndarray] = {}  # the decoded frames of one file at a time
    for one, (slope, intercept) in zip(slices, rescale, strict=True):
        if one.file not in opened:
            opened = {one.file: _decode(one, headers[one.file])}
        planes.append(int16_or_float32(opened[one.file][one.frame].astype(np.float64) * slope + intercept))
    return DicomVolume(np.stack(planes).T, affine, tuple(one.file for one in slices))


def _check_kind(name: str, header: Dataset) -> None:
    """Refuse objects of modality CT that are not slices of a CT volume in grey values."""
    sop_class = header.get("SOPClassUID")
    if sop_class not in (None, *CT_CLASSES) or "ConversionType" in header:
        kind = "a converted image (ConversionType)" if sop_class in (None, *CT_CLASSES) else f"a {sop_class.name}"
        raise NoScan(f"{name} is {kind}, not a CT image, so its values are not in HU: use the original series")
    colours = header.get("PhotometricInterpretation") or "MONOCHROME2"
    if not colours.startswith("MONOCHROME"):
        raise NoScan(f"{name} is a colour image ({colours}), not a CT image: use the original series")
    if _is_localizer(header):
        raise NoScan("it is a localizer (scout view), not a volume: exclude it")


def _rescale(one: Slice, header: Dataset) -> tuple[float, float]:
    group = "PixelValueTransformationSequence"
    slope = float(frame_numbers(header, one.file, one.frame, group, "RescaleSlope", 1)[0])
    intercept = float(frame_numbers(header, one.file, one.frame, group, "RescaleIntercept", 1)[0])
    unit = str(frame_element(header, one.frame, group, "RescaleType") or "")
    if slope == 0:
        raise RefusedScan(f"{Path(one.file).name} has RescaleSlope 0, which makes all values equal: export it again")
    if unit not in HU_TYPES:
        raise RefusedScan(f"{Path(one.file).name} contains values in {unit} (RescaleType), not in HU: exclude it")
    return slope, intercept


def _decode(one: Slice, header: Dataset) -> np.ndarray:
    """Return the stored values of all frames in the file of a slice, shape (frames, rows, columns)."""
    # A file without the preamble does not record its transfer syntax and uses the default one.
    syntax = header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
    name = f"{Path(one.file).name} ({syntax.name})"
    try:
        supported = not syntax.is_compressed or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        supported = False
    if not supported:
        raise RefusedScan(f"the compression of {name} is not supported: decompress it, e.g. with gdcmconv --raw")
    try:
        dataset = pydicom.dcmread(one.file, force=True)
        dataset.file_meta.TransferSyntaxUID = syntax
        return dataset.pixel_array.reshape(-1, *one.shape[::-1])
    except MemoryError:
        raise
    except Exception as error:  # each decoder raises its own errors for broken data
        raise RefusedScan(
            f"the pixels of {name} cannot be decoded: truncated or damaged ({first_line(error)}). Copy the file again"
        ) from error
