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

import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from ..errors import NoScan, RefusedScan
from ..extras import cure
from .dicom.size import check_bits, check_fragments, check_size, transfer_syntax
from .dicom.split import ATTRIBUTES, Image, join_single_images, split_stack
from .dicom.tilt import straighten
from .dicom_headers import THREADS, first_line, read_header, read_headers, read_image, valid_uid
from .headers.plausible import check_plausible
from .int16_voxels import int16_or_float32
from .slice_grid import MIN_SLICES, Slice, frame_element, frame_numbers, grid_affine, is_tilted, sort_slices

logger = logging.getLogger(__name__)

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
# Accepted RescaleType, in any case; many scanners write US ("unspecified") for plain HU.
HU_TYPES = ("", "HU", "HU_MOD", "US", "HOUNSFIELD", "HOUNSFIELD UNITS")
COLOURS = ("RGB", "ARGB", "CMYK", "HSV", "PALETTE", "YBR", "XYB")  # how a PhotometricInterpretation of colours begins
# Largest difference of direction cosines within a stack: 0.6 degrees. Slices that differ by less stay together, and
# `read_series` judges them: if the last decimals split a stack, every second slice could form a volume of its own.
STACK_TOLERANCE = 0.01

# Together with PatientID and StudyInstanceUID, these identify whose image it is. No step of an export changes them in
# one series.
OWNER_TAGS = ("PatientName", "FrameOfReferenceUID")

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


@dataclass(frozen=True)
class Series:
    """One stack of images of a DICOM series, or its objects of another kind. Missing texts are "".

    Attributes:
        files: sorted by name; `read_series` finds the order of the slices.
        series_uid: SeriesInstanceUID, "" if it is not valid. Several stacks can share it, see `find_series`.
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
        files: the file of each slice along Z; that of an Enhanced (multi-frame) image is repeated. Empty if the voxels
            were resampled.
    """

    voxels: np.ndarray
    affine: np.ndarray
    files: tuple[str, ...]


def find_series(files: Iterable[str | os.PathLike]) -> tuple[list[Series], dict[str, str]]:
    """Group DICOM files into series by their headers; file names and folders do not matter.

    A series that mixes image sizes, orientations, or localizers and slices is split into one `Series` for each. Other
    tags, such as AcquisitionNumber and ImageType, can change within a volume. They split a series only if the slice
    positions confirm it, see `split_stack`. `read_series` refuses mixtures that remain. Files with equal headers and
    pixels count once.

    Images of one folder and patient that each have their own SeriesInstanceUID are one series (see
    `join_single_images`).

    Images without a valid SeriesInstanceUID, as some anonymisers leave them (empty, ``0``, ``anonymous``), form one
    series per folder, study, patient and name. One or two of them next to images that have one belong to no series:
    they may be slices of it.

    Args:
        files: any files.

    Returns:
        The series, sorted by their first file, and a dict of the files that belong to no series, with the reasons.
    """
    names = sorted({os.fspath(file) for file in files})
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(_find, names), strict=True))
    reasons = {name: one for name, one in found.items() if isinstance(one, str)}
    images = [one for one in found.values() if not isinstance(one, str)]
    images, strays = _without_strays(images)
    reasons.update(strays)
    copies = _copies(images)
    images = join_single_images([one for one in images if one.file not in copies])
    stacks: dict[tuple, list[list[Image]]] = {}
    for one in images:
        groups = stacks.setdefault(one.key, [])
        for members in groups:
            if _same_directions(members[0].directions, one.directions):
                members.append(one)
                break
        else:
            groups.append([one])
    if copies:
        copy, original = next(iter(copies.items()))
        logger.info("Skipped %d files that are copies of others, such as %s of %s.", len(copies), copy, original)
    parts = [part for groups in stacks.values() for members in groups for part in split_stack(members)]
    series = [Series(tuple(one.file for one in part), *part[0].texts) for part in parts]
    return sorted(series, key=lambda one: one.files), reasons


def _find(file: str) -> Image | str:
    """Return the properties that `find_series` groups a file by, or the reason why it belongs to no series."""
    try:
        header = read_header(file, convert=_GROUPING_TAGS)
    except RefusedScan as reason:
        return str(reason)
    keywords = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "SeriesDescription")
    texts = tuple(sys.intern(_text(header, keyword)) for keyword in keywords)  # one string for all files that share it
    texts = (valid_uid(texts[0]), *texts[1:3], texts[3].upper(), texts[4])
    series, study, patient, modality, _ = texts
    name, frame_of_reference = (sys.intern(_any_text(header, keyword)) for keyword in OWNER_TAGS)
    folder = sys.intern(os.path.dirname(os.path.abspath(file)))
    size = (_text(header, "Rows"), _text(header, "Columns"))
    directory = header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    if directory or "SeriesInstanceUID" not in header and not all(size):
        return "it belongs to no DICOM series (no SeriesInstanceUID): it may be a DICOMDIR, or truncated"
    # Without a UID, files of one folder and patient form a series: elsewhere, the same slice may be of somebody else.
    identity = (series,) if series else ("", folder, study, patient, name)
    # Some anonymisers write one SOPInstanceUID into all files: a copy must agree in everything else as well.
    rest = [_text(header, keyword) for keyword in ("SOPInstanceUID", "ImageType", "ImagePositionPatient")]
    attributes = tuple(sys.intern(_any_text(header, keyword)) for keyword in ATTRIBUTES)
    return Image(
        file=file,
        texts=texts,
        key=(*identity, modality, _is_localizer(header), *size),
        owner=(patient, study, name, frame_of_reference),
        folder=folder,
        attributes=attributes,
        directions=_numbers(header, "ImageOrientationPatient", 6),
        position=_numbers(header, "ImagePositionPatient", 3),
        instance=(*identity, study, patient, name, *rest, _any_text(header, "InstanceNumber"), *attributes),
        named=bool(valid_uid(_text(header, "SOPInstanceUID"))),
    )


def _without_strays(images: list[Image]) -> tuple[list[Image], dict[str, str]]:
    """Take out the few images without a SeriesInstanceUID in a folder of images that have one."""
    identified = {one.folder for one in images if one.texts[0]}
    counts = Counter(one.key for one in images)
    reason = (
        "it has no valid SeriesInstanceUID, unlike the other images in its folder: it may be a slice of one of them, or "
        "truncated; export the series again"
    )
    strays = {
        one.file: reason
        for one in images
        if not one.texts[0] and one.key[1] in identified and one.position is not None and counts[one.key] < MIN_SLICES
    }
    return [one for one in images if one.file not in strays], strays


def _copies(images: Sequence[Image]) -> dict[str, str]:
    """Return the files that are copies of others, each with the first file that has the same headers and pixels."""
    alike: dict[tuple, list[Image]] = {}
    for one in images:
        alike.setdefault(one.instance, []).append(one)
    groups = [group for group in alike.values() if len(group) > 1]
    files = [one.file for group in groups for one in group]
    copies = {}
    with ThreadPoolExecutor(THREADS) as pool:
        stored = dict(zip(files, pool.map(_stored_pixels, files), strict=True))
    for group in groups:
        # One image may be stored in two ways: then what they decode to counts.
        same_form = group[0].named and len({stored[one.file][0] for one in group}) == 1
        originals: dict[str, str] = {}
        for one in group:
            content = stored[one.file][1] if same_form else _decoded_pixels(one.file, one.named)
            original = originals.setdefault(content, one.file)
            if original != one.file:
                copies[one.file] = original
    return copies


def _stored_pixels(file: str) -> tuple[str, str]:
    """Return the transfer syntax and a checksum of the pixels as they are stored, or of the file if it has none."""
    header = read_header(file)
    try:
        pixels = read_image(file, header).PixelData
    except Exception:  # not an image, or damaged: whoever reads it says so
        pixels = Path(file).read_bytes()
    return str(transfer_syntax(header)), hashlib.sha256(pixels).hexdigest()


def _decoded_pixels(file: str, named: bool) -> str:
    """Return a checksum of the pixels; the path, which is unique, if they have one value (air) and no UID."""
    try:
        decoded = _decode(file, read_header(file))
        if not named and decoded.min() == decoded.max():
            return file
        pixels = decoded.tobytes()
    except RefusedScan:
        pixels = Path(file).read_bytes()
    return hashlib.sha256(pixels).hexdigest()


def _same_directions(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is None and other is None
    return bool(np.allclose(one, other, rtol=0, atol=STACK_TOLERANCE))


def _is_localizer(header: Dataset) -> bool:
    return "LOCALIZER" in _text(header, "ImageType")


def _numbers(header: Dataset, keyword: str, count: int) -> np.ndarray | None:
    try:
        found = np.array(header.get(keyword), dtype=float)
    except (TypeError, ValueError):
        return None
    return found if found.shape == (count,) and np.isfinite(found).all() else None


def _any_text(header: Dataset, keyword: str) -> str:
    """Return a value as text; as it is stored if pydicom cannot convert it, as some scanners write."""
    try:
        return _text(header, keyword)
    except Exception:  # pydicom raises several kinds
        value = header.get_item(keyword).value
        return value.decode("latin-1").strip("\0 ") if isinstance(value, bytes) else str(value)


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip("\0 ")


def read_series(series: Series, *, straighten_tilt: bool = False) -> DicomVolume:
    """Read a CT series in HU, with the slices in spatial order.

    HU is the stored value x RescaleSlope + RescaleIntercept of each slice. Padding keeps its value.

    Args:
        series: one of `find_series`.
        straighten_tilt: resample a scan made with a tilted gantry onto an upright grid instead of refusing it (see
            `straighten`). Its ``files`` are then empty: the grid is not that of the slices.

    Raises:
        NoScan: they are something other than a CT volume, such as a scout view.
        RefusedScan: the files are not one CT volume of evenly spaced, upright slices, have a grid that no scan has, or
            cannot be decoded.
    """
    if series.modality != "CT":
        # Of several values, CT may be one: then it could be a CT that is missing, as without a modality.
        kind = NoScan if series.modality and "'CT'" not in series.modality else RefusedScan
        raise kind(f"its modality is {series.modality or 'missing'}: only CT is supported")
    try:
        return _read(series, straighten_tilt)
    except (RefusedScan, MemoryError):
        raise
    except Exception as error:  # pydicom raises many kinds for values of the wrong form
        raise RefusedScan(
            f"it cannot be read as a CT volume ({type(error).__name__}: {first_line(error)}): export it again"
        ) from error


def _read(series: Series, straighten_tilt: bool) -> DicomVolume:
    headers = read_headers(series.files)
    first = series.files[0]
    for file, header in headers.items():
        _check_kind(Path(file).name, header)
        check_size(file, header)
        if _text(header, "PatientID") != _text(headers[first], "PatientID"):
            raise RefusedScan(
                f"{Path(first).name} and {Path(file).name} are of two patients (PatientID), but of one series by their "
                "SeriesInstanceUID and positions: use the files of one patient only, or export the series again"
            )
    _check_owner(headers)
    slices = sort_slices(headers)
    affine = grid_affine(slices, tilted=straighten_tilt)
    check_plausible((*slices[0].shape, len(slices)), affine)
    rescale = [_rescale(one, headers[one.file]) for one in slices]

    planes: list[np.ndarray] = []
    opened: dict[str, np.ndarray] = {}  # the decoded frames of one file at a time
    for one, (slope, intercept) in zip(slices, rescale, strict=True):
        if one.file not in opened:
            opened = {one.file: _decode(one.file, headers[one.file]).reshape(-1, *one.shape[::-1])}
        planes.append(int16_or_float32(opened[one.file][one.frame].astype(np.float64) * slope + intercept))
    voxels = np.stack(planes).T
    if straighten_tilt and is_tilted(affine, len(slices)):
        return DicomVolume(*straighten(voxels, affine), ())
    return DicomVolume(voxels, affine, tuple(one.file for one in slices))


def _check_owner(headers: Mapping[str, Dataset]) -> None:
    """Refuse files of several folders whose names or frames of reference differ; in one folder, anonymisers do this."""
    first, *others = headers
    if len({os.path.dirname(os.path.abspath(file)) for file in headers}) == 1:
        return
    for keyword in OWNER_TAGS:
        for other in others:
            if _any_text(headers[other], keyword) != _any_text(headers[first], keyword):
                raise RefusedScan(
                    f"{first} and {other} differ in {keyword}, but are of one series by their SeriesInstanceUID and "
                    "positions: they may be of two patients. Use the files of one folder only, or export the series "
                    "again"
                )


def _check_kind(name: str, header: Dataset) -> None:
    """Refuse objects of modality CT that are not slices of a CT volume in grey values."""
    sop_class = UID(_text(header, "SOPClassUID"))
    known = sop_class in ("", *CT_CLASSES)
    if not known or _text(header, "ConversionType"):
        kind = "a converted image (ConversionType)" if known else f"a {sop_class.name}"
        # A class of a vendor may hold the only CT; what it calls raw data has no place in space.
        may_be_ct = not known and sop_class.name == sop_class and header.get("ImagePositionPatient")
        raise (RefusedScan if may_be_ct else NoScan)(
            f"{name} is {kind}, not a CT image, so its values are not in HU: use the original series"
        )
    colours = _photometric(header)
    if colours.startswith(COLOURS):
        raise NoScan(f"{name} is a colour image ({colours}), not a CT image: use the original series")
    if not colours.startswith("MONOCHROME"):
        raise RefusedScan(f"{name} has PhotometricInterpretation {colours}, not MONOCHROME2: export it again")
    if _is_localizer(header):
        raise NoScan("it is a localizer (scout view), not a volume: exclude it")


def _rescale(one: Slice, header: Dataset) -> tuple[float, float]:
    group = "PixelValueTransformationSequence"
    slope = float(frame_numbers(header, one.file, one.frame, group, "RescaleSlope", 1)[0])
    intercept = float(frame_numbers(header, one.file, one.frame, group, "RescaleIntercept", 1)[0])
    unit = str(frame_element(header, one.frame, group, "RescaleType") or "")
    if slope == 0:
        raise RefusedScan(f"{Path(one.file).name} has RescaleSlope 0, which makes all values equal: export it again")
    if unit.strip("\0 ").upper() not in HU_TYPES:
        raise RefusedScan(f"{Path(one.file).name} contains values in {unit} (RescaleType), not in HU: exclude it")
    return slope, intercept


def _photometric(header: Dataset) -> str:
    return _text(header, "PhotometricInterpretation").upper() or "MONOCHROME2"


def _check_decoder(syntax: UID, name: str) -> None:
    """Refuse a compression that no installed decoder reads."""
    try:
        decoder = get_decoder(syntax)
        available, lacks = decoder.is_available, decoder.missing_dependencies
    except (NotImplementedError, ValueError):
        available, lacks = False, []
    if available:
        return
    if any(package.startswith("gdcm") for package in lacks):
        raise RefusedScan(
            f"the compression of {name} needs a decoder that is not installed. {cure('dicom', 'python-gdcm', 'pyjpegls')}"
        )
    raise RefusedScan(f"the compression of {name} is not supported: decompress it, e.g. with gdcmconv --raw")


def _decode(file: str, header: Dataset) -> np.ndarray:
    """Return the stored values of all frames of a file."""
    syntax = transfer_syntax(header)
    name = f"{Path(file).name} ({syntax.name})"
    if syntax.is_compressed:
        _check_decoder(syntax, name)
    check_size(file, header)
    check_bits(file, header)
    try:
        dataset = read_image(file, header)
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax.is_encapsulated:
            check_fragments(dataset, name)
        dataset.PhotometricInterpretation = _photometric(header)
        if not dataset.get("SamplesPerPixel"):
            dataset.SamplesPerPixel = 1
        return dataset.pixel_array
    except RefusedScan as reason:
        raise RefusedScan(str(reason) if name in str(reason) else f"{name}: {reason}") from reason
    except MemoryError:
        raise
    except Exception as error:  # each decoder raises its own errors for broken data
        raise RefusedScan(
            f"the pixels of {name} cannot be decoded: truncated or damaged ({first_line(error)}). Copy the file again"
        ) from error
