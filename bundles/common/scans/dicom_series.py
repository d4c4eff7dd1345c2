# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""CT series from DICOM files, in HU on their true grid, or refused with the reason.

pydicom decodes; `slice_grid` works out the grid from the standard's formula, as no reader could be taken as it is. On
hand-made series with even slices all put the voxels in their places (ITK 5.4 rounded HU where slices have slopes of
their own). But MONAI 1.6 and ITK closed up a missing slice and uneven gaps without an error, and gave two slices of one
place a place each. highdicom 0.28, the most faithful, and the only one to read an Enhanced image rightly, refused these
without saying where, took a gantry tilted by 1.5 degrees for an upright one, and held three times the memory.
dicom2nifti 2.6 refused them too, and made that tilt a sheared grid.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
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

from ..errors import RefusedScan
from .slice_grid import MAX_SHIFT, SAME_PLACE, Slice, frame_element, frame_numbers, grid_affine, sort_slices

logger = logging.getLogger(__name__)

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
HU_TYPES = ("", "HU", "HU_MOD", "US")  # of RescaleType; many scanners write US, "unspecified", for plain HU
# Of direction cosines, between stacks: 0.6 degrees. What differs by less stays together, for `read_series` to judge:
# split by the last decimals, every second slice could make a volume of its own.
STACK_TOLERANCE = 0.01
THREADS = 8  # that read headers: on network drives the time goes by waiting

_FOUND_BY = [
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
# Compared as they are stored: scanners write them in ways that pydicom refuses to convert.
_NUMBERS = ["AcquisitionNumber", "InstanceNumber"]
# A file without the preamble begins with an element of group 2 or 8.
_BARE_STARTS = (b"\x02\x00", b"\x08\x00")


@dataclass(frozen=True)
class Series:
    """One stack of images of a DICOM series, or its objects of another kind; texts are "" where the files have none.

    Attributes:
        files: sorted by name; the order of the slices is found by `read_series`.
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
        voxels: HU, shape (X, Y, Z): columns, rows, slices; int16 where all values are whole and fit, else float32.
        affine: (4, 4), voxel indices to mm in RAS, as nibabel's. Z runs along row direction x column direction.
        files: the file of each slice along Z; an Enhanced (multi-frame) image stands in every place.
    """

    voxels: np.ndarray
    affine: np.ndarray
    files: tuple[str, ...]


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file is DICOM by its content: it has the preamble, or parses without it. False if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            if stream.read(132)[128:] == b"DICM":
                return True
        return "SOPClassUID" in _read_header(path, tags=["SOPClassUID"])
    except (OSError, RefusedScan):
        return False


def find_series(files: Iterable[str | os.PathLike]) -> tuple[list[Series], dict[str, str]]:
    """Group DICOM files into series by their headers; names and folders of the files do not matter.

    A series that mixes sizes, orientations or localizers and slices is split into one `Series` for each. Other tags may
    change within a volume, as ImageType and SeriesDescription do, so they split only where the places of the slices
    say so, see `_split`; a mixture that stays is refused by `read_series`. Copies of a file are counted once.

    Args:
        files: any files.

    Returns:
        The series, sorted by their first file, and for each file that belongs to none the reason.
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
            alike = stacks.setdefault(found.key, [])
            for members in alike:
                if _same_directions(members[0].directions, found.directions):
                    members.append(found)
                    break
            else:
                alike.append([found])
    if copies:
        logger.info("Left out %d files that are copies of others, such as %s.", len(copies), copies[0])
    parts = [part for alike in stacks.values() for members in alike for part in _split(members)]
    series = [Series(tuple(one.file for one in part), *part[0].texts) for part in parts]
    return sorted(series, key=lambda one: one.files), reasons


class _Found(NamedTuple):
    file: str
    texts: tuple[str, ...]  # those of `Series`
    key: tuple  # what always tells stacks apart
    owner: tuple[str, str]  # patient and study
    image_type: str
    directions: np.ndarray | None
    position: np.ndarray | None
    instance: tuple


def _find(file: str) -> _Found | str:
    """Return what `find_series` groups a file by, or why it belongs to no series."""
    try:
        header = _read_header(file, tags=_FOUND_BY, unconverted=_NUMBERS)
    except RefusedScan as reason:
        return str(reason)
    if "SeriesInstanceUID" not in header:
        return "it belongs to no DICOM series (no SeriesInstanceUID), as a DICOMDIR or a truncated file"
    keywords = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "SeriesDescription")
    texts = tuple(sys.intern(_text(header, keyword)) for keyword in keywords)  # one copy for a million files
    series, study, patient, modality, _ = texts
    # Some anonymisers give all files one SOPInstanceUID: only where all the rest is the same is it a copy.
    rest = [_text(header, keyword) for keyword in ("SOPInstanceUID", "ImageType", "ImagePositionPatient")]
    rest += [header.get_item(keyword).value if keyword in header else None for keyword in _NUMBERS]
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
    """Split files of one SeriesInstanceUID, size and orientation where they are clearly several volumes.

    By patient and study, as some anonymisers give all series one UID, unless together they are one even stack: the
    halves of a volume would pass for volumes. By ImageType only if each of its values has the same places, as of two
    reconstructions. Files without places (multi-frame images) are split by both.
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
    """Return the places of files along the normal of the slices, in mm and in order; None if one has none."""
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


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value)


def _read_header(
    file: str | os.PathLike, tags: Sequence[str] | None = None, unconverted: Sequence[str] = ()
) -> Dataset:
    """Read a DICOM file, with or without the preamble, up to the pixels: all elements or those of ``tags``.

    Those of ``unconverted`` are read with ``tags``, but may have values that pydicom cannot convert.

    Raises:
        RefusedScan: if it cannot be opened or is no DICOM file.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(132)
        if not start:
            raise RefusedScan("it is empty (0 bytes)")
        bare = start[128:] != b"DICM"
        if bare and start[:2] not in _BARE_STARTS:
            raise RefusedScan("it is no DICOM file")
        wanted = None if tags is None else [*tags, *unconverted]
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted, force=bare)
        for keyword in tags or ():
            dataset.get(keyword)  # converts the value, which can fail
        return dataset
    except (RefusedScan, MemoryError):
        raise
    except OSError as error:
        raise RefusedScan(f"it cannot be opened ({error.strerror or error})") from error
    except Exception as error:  # what pydicom raises for a broken file depends on where it breaks
        raise RefusedScan(f"it cannot be read as DICOM: truncated or damaged ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".:") or type(error).__name__


def read_series(series: Series) -> DicomVolume:
    """Read a CT series in HU, slices in their order in space.

    HU are stored value x RescaleSlope + RescaleIntercept of each slice. Padding keeps its value.

    Raises:
        RefusedScan: if the files are not one CT volume of even, upright slices, or cannot be decoded.
    """
    if series.modality != "CT":
        raise RefusedScan(f"its modality is {series.modality or 'not given'}: only CT is read")
    headers = read_headers(series.files)
    first = series.files[0]
    for file, header in headers.items():
        _check_kind(Path(file).name, header)
        if _text(header, "PatientID") != _text(headers[first], "PatientID"):
            raise RefusedScan(
                f"{Path(first).name} and {Path(file).name} are of two patients (PatientID), but of one series by their "
                "SeriesInstanceUID and their places: give the files of one patient alone, or export it again"
            )
    slices = sort_slices(headers)
    affine = grid_affine(slices)
    rescale = [_rescale(one, headers[one.file]) for one in slices]

    planes: list[np.ndarray] = []
    opened: dict[str, np.ndarray] = {}  # the frames of one file at a time
    for one, (slope, intercept) in zip(slices, rescale, strict=True):
        if one.file not in opened:
            opened = {one.file: _decode(one, headers[one.file])}
        planes.append(_hounsfield(opened[one.file][one.frame], slope, intercept))
    return DicomVolume(np.stack(planes).T, affine, tuple(one.file for one in slices))


def read_headers(files: Iterable[str]) -> dict[str, Dataset]:
    """Read all of each file but the pixels; files named twice are read once.

    Raises:
        RefusedScan: names the file that cannot be read.
    """

    def header(file: str) -> Dataset:
        try:
            return _read_header(file)
        except RefusedScan as reason:
            raise RefusedScan(f"{Path(file).name}: {reason}") from reason

    names = list(dict.fromkeys(files))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(header, names), strict=True))


def _check_kind(name: str, header: Dataset) -> None:
    """Refuse what has the modality CT but is no slice of a CT volume in grey values."""
    sop_class = header.get("SOPClassUID")
    if sop_class not in (None, *CT_CLASSES) or "ConversionType" in header:
        kind = "a converted picture (ConversionType)" if sop_class in (None, *CT_CLASSES) else f"a {sop_class.name}"
        raise RefusedScan(f"{name} is {kind}, no CT image, so its values are not in HU: give the original series")
    colours = header.get("PhotometricInterpretation") or "MONOCHROME2"
    if not colours.startswith("MONOCHROME"):
        raise RefusedScan(f"{name} is a colour picture ({colours}), no CT image: give the original series")
    if _is_localizer(header):
        raise RefusedScan("it is a localizer (scout view), no volume: leave it out")


def _rescale(one: Slice, header: Dataset) -> tuple[float, float]:
    group = "PixelValueTransformationSequence"
    slope = float(frame_numbers(header, one.file, one.frame, group, "RescaleSlope", 1)[0])
    intercept = float(frame_numbers(header, one.file, one.frame, group, "RescaleIntercept", 1)[0])
    unit = str(frame_element(header, one.frame, group, "RescaleType") or "")
    if slope == 0:
        raise RefusedScan(f"{Path(one.file).name} has the RescaleSlope 0, so all its values are one: export it again")
    if unit not in HU_TYPES:
        raise RefusedScan(f"{Path(one.file).name} holds values in {unit} (RescaleType), not in HU: leave it out")
    return slope, intercept


def _decode(one: Slice, header: Dataset) -> np.ndarray:
    """Return the stored values of all frames of a slice's file, shape (frames, rows, columns)."""
    # A file without the preamble does not name its syntax, and is in the default one.
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
    except Exception as error:  # each decoder has its own for broken data
        raise RefusedScan(
            f"the pixels of {name} cannot be decoded: truncated or damaged ({_first_line(error)}). Copy the file again"
        ) from error


def _hounsfield(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    values = stored.astype(np.float64) * slope + intercept
    low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    fits = low <= values.min() and values.max() <= high and np.array_equal(np.rint(values), values)
    return values.astype(np.int16 if fits else np.float32)
