# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Copies of CT headers that a DICOM segmentation may refer to: one grid, and only values that the standard allows.

highdicom copies patient, study, equipment and frame of reference from its source images, and raises at the first value
that the standard does not allow. Real headers are full of them: anonymisers write ``00000000``, ``U`` or nothing.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom import config
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, SegmentationStorage, generate_uid
from pydicom.valuerep import DA, DT, TM, DSfloat, validate_value

from ...common.extras import import_extra
from ...common.scans.dicom_headers import valid_uid
from ...common.scans.slice_grid import Slice, frame_element, grid_affine

if TYPE_CHECKING:
    import highdicom as hd

# highdicom reads these from its source; all may be empty (type 2).
EMPTY_IF_UNKNOWN = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName"),
)
# What highdicom reads besides the attributes of patient and study: how the image was made, for its acquisition.
ACQUISITION = (
    *("PositionReferenceIndicator", "LossyImageCompression", "LossyImageCompressionRatio"),
    *("LossyImageCompressionMethod", "Manufacturer", "ManufacturerModelName", "SoftwareVersions"),
    *("DeviceSerialNumber", "InstitutionName", "InstitutionalDepartmentName", "InstitutionAddress", "StationName"),
    *("AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime"),
)
# Enumerated values of PS3.3, for the attributes above and those of patient and study.
ENUMERATED = {
    "LossyImageCompression": ("00", "01"),
    "PatientIdentityRemoved": ("YES", "NO"),
    "PatientSex": ("M", "F", "O"),
    "PatientSexNeutered": ("ALTERED", "UNALTERED"),
    "PregnancyStatus": (1, 2, 3, 4),
    "QualityControlSubject": ("YES", "NO"),
    "SmokingStatus": ("YES", "NO", "UNKNOWN"),
}
MOMENTS = {"DA": DA, "DT": DT, "TM": TM}
LONG_TEXTS = ("LT", "ST", "UT")  # may have line breaks, and a backslash is a character
UTF_8 = "ISO_IR 192"
DEFAULT_REPERTOIRE = "ISO 2022 IR 6"
DECIMALS = 6  # decimals of positions, in mm
REPLACEMENT = "\ufffd"  # what pydicom reads for bytes that its character set does not have
SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Source:
    """What `highdicom.seg.Segmentation` needs to know about the source of a segmentation.

    Attributes:
        images: one header per file, in the order of the slices. They hold what highdicom needs, and no pixels.
        places: position of each slice.
        replaced: what stood in the headers and was replaced, by attribute, such as ``'U', now empty``.
    """

    images: list[Dataset]
    places: list[list[DSfloat]]
    replaced: dict[str, str]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of highdicom. It takes one multi-frame image, the planes in the order of its frames, or slices.

        With several multi-frame images the planes are placed by their positions.
        """
        first, *others = self.images
        if not others or "NumberOfFrames" not in first:
            return {"source_images": self.images}
        hd = highdicom()
        patient = hd.CoordinateSystemNames.PATIENT
        places = [hd.PlanePositionSequence(patient, [float(number) for number in place]) for place in self.places]
        return {"source_images": [first], "further_source_images": others, "plane_positions": places}


def highdicom() -> ModuleType:
    """Return the module highdicom, which only DICOM segmentations need.

    Raises:
        InputError: it is not installed.
    """
    return import_extra("highdicom", extra="dicom", use="A DICOM segmentation")


def segmentation_source(slices: Sequence[Slice], headers: Mapping[str, Dataset], texts: Iterable[str] = ()) -> Source:
    """Return copies of the headers of a series with legal values, on the grid of `grid_affine`.

    A value that the standard does not allow becomes empty where the standard asks for the attribute, else it is left
    out. A missing UID becomes a new one, always the same for the same series. UIDs of digits and dots are kept even if
    they break a finer rule: the segmentation has to match the images that an archive holds.

    Args:
        slices: as from `sort_slices`.
        headers: the header of each file, which are not changed.
        texts: further texts of the segmentation. The character set must be able to write them.

    Raises:
        RefusedScan: the slices have no common grid.
    """
    replaced: dict[str, str] = {}
    frames: dict[str, list[tuple[int, int]]] = defaultdict(list)  # frames of each file, with the index of the slice
    for index, one in enumerate(slices):
        frames[one.file].append((one.frame, index))
    files = list(frames)
    common = _legal_part(headers[files[0]], replaced)
    _set_character_set(common, headers[files[0]], texts, replaced)
    _set_thickness(common, headers[files[0]], slices, replaced)
    common.Columns, common.Rows = slices[0].shape
    common.Modality = "CT"
    identity = _Identity(files, headers)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(common, keyword, identity.shared(keyword, replaced))

    places = _places(slices)
    images = []
    for file in files:
        image = Dataset()
        image.update(common)  # the elements are shared: nothing changes them
        several = len(frames[file]) > 1 or _is_multi_frame(headers[file])
        kind = _uid(headers[file], "SOPClassUID") or CTImageStorage
        image.SOPClassUID = EnhancedCTImageStorage if several and kind == CTImageStorage else kind
        image.SOPInstanceUID = identity.instance(file, replaced)
        _set_grid(image, slices[0], [places[index] for _, index in sorted(frames[file])], several)
        images.append(image)
    return Source(images, places, replaced)


# ---- values --------------------------------------------------------------------------------------------------------


def _legal_part(header: Dataset, replaced: dict[str, str]) -> Dataset:
    """Return the attributes that highdicom copies, without values that the standard does not allow."""
    legal = Dataset()
    for keyword in (*_copied_by_highdicom(frozenset(header.dir())), *ACQUISITION):
        if keyword not in header:
            continue
        try:
            value = _legal_value(header, keyword)
        except Exception as reason:  # whatever pydicom raises for a value that it cannot convert
            now = "now empty" if keyword in EMPTY_IF_UNKNOWN else "left out"
            replaced[keyword] = f"{_shown(header, keyword)}, {now} ({str(reason).splitlines()[0][:100]})"
        else:
            setattr(legal, keyword, value)
    for keyword in EMPTY_IF_UNKNOWN:
        if keyword not in legal:
            setattr(legal, keyword, None)
    return legal


@functools.lru_cache(maxsize=8)
def _copied_by_highdicom(keywords: frozenset[str]) -> list[str]:
    """Return which attributes of a header highdicom copies into a segmentation, apart from the UIDs."""
    probe = Dataset()
    for keyword in keywords:
        setattr(probe, keyword, None)
    probe.SOPClassUID, probe.SOPInstanceUID = CTImageStorage, generate_uid()
    target = _bare_object()
    for keyword in target.dir():
        if keyword != "SOPClassUID":  # says which modules there are
            delattr(target, keyword)
    target.copy_patient_and_study_information(probe)
    target.copy_specimen_information(probe)
    copied = keywords & {*target.dir(), *EMPTY_IF_UNKNOWN}
    return sorted(copied - {"SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SpecificCharacterSet"})


def _bare_object(**options: Any) -> hd.SOPClass:
    uids = {name: generate_uid() for name in ("study_instance_uid", "series_instance_uid", "sop_instance_uid")}
    numbers = {"series_number": 1, "instance_number": 1}
    return highdicom().SOPClass(**uids, **numbers, sop_class_uid=SegmentationStorage, modality="SEG", **options)


def _legal_value(dataset: Dataset, keyword: str) -> Any:
    """Return the value of an attribute if the standard allows it, in the representation that the standard asks for.

    Raises:
        Exception: it does not; pydicom raises several kinds.
    """
    vr = dictionary_VR(tag_for_keyword(keyword))[:2]
    value = dataset[keyword].value
    if vr == "SQ":
        return [_legal_item(item) for item in value or ()]
    values = list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]
    if values in ([None], [""], [b""]) or not values:
        return None
    if any(REPLACEMENT in str(one) for one in values):
        raise ValueError("not readable in its character set")
    if vr in LONG_TEXTS:
        values = ["\\".join(map(str, values))]
    if not _multiplicity_allows(dictionary_VM(tag_for_keyword(keyword)), len(values)):
        raise ValueError(f"{len(values)} values instead of {dictionary_VM(tag_for_keyword(keyword))}")
    legal = [_legal_single(vr, one) for one in values]
    for one in legal:
        if keyword in ENUMERATED and one not in ENUMERATED[keyword]:
            raise ValueError(f"not one of {', '.join(map(str, ENUMERATED[keyword]))}")
    return legal[0] if len(legal) == 1 else legal


def _legal_item(item: Dataset) -> Dataset:
    legal = Dataset()
    for element in item:
        if not element.keyword:
            continue  # private, or unknown to the dictionary
        setattr(legal, element.keyword, _legal_value(item, element.keyword))
    return legal


def _legal_single(vr: str, value: Any) -> Any:
    if vr == "DS":
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("not a finite number")
        return DSfloat(number, auto_format=True)
    if vr in ("IS", "US", "SS", "UL", "SL"):
        number = int(value)
        validate_value(vr, number, config.RAISE)
        return number
    if vr in ("FD", "FL", "OB", "OW", "UN", "AT"):
        validate_value(vr, value, config.RAISE)
        return value
    if isinstance(value, (bytes, bytearray)):
        raise ValueError("bytes instead of text")
    text = str(value)  # a name as well: in the character set of the copy
    validate_value(vr, text, config.RAISE)
    allowed = "\t\n\f\r" if vr in LONG_TEXTS else ""
    if any(ord(character) < 32 and character not in allowed or ord(character) == 127 for character in text):
        raise ValueError("control characters")
    if text and vr in MOMENTS:
        MOMENTS[vr](text)  # 31 February has the right form
    return text


def _multiplicity_allows(multiplicity: str, count: int) -> bool:
    low, _, high = multiplicity.partition("-")
    if not high:
        return count == int(low)
    step = int(high.removesuffix("n") or 1) if high.endswith("n") else 1
    return count >= int(low) and (high.endswith("n") or count <= int(high)) and (count - int(low)) % step == 0


def _set_character_set(common: Dataset, header: Dataset, texts: Iterable[str], replaced: dict[str, str]) -> None:
    """Set the character set of the source if it is legal and can write all texts, else UTF-8."""
    own = list(texts)
    words = [*own, *_texts_of(common)]
    try:
        value = header.get("SpecificCharacterSet") or None
        value = list(value) if isinstance(value, (MultiValue, list, tuple)) else value
    except Exception:  # pydicom cannot convert it
        value = "?"
    value = "?" if isinstance(value, bytes) else value
    if value is not None and not _is_legal_character_set(value):
        # An empty first value means the default one, which highdicom wants by its name: the bytes stay the same.
        named = [DEFAULT_REPERTOIRE, *value[1:]] if isinstance(value, list) and value[0] == "" else UTF_8
        value = named if _is_legal_character_set(named) else UTF_8
        now = value if value == UTF_8 else "\\".join(value)
        replaced["SpecificCharacterSet"] = f"{_shown(header, 'SpecificCharacterSet')}, now {now}"
    elif not all(map(str.isascii, own)) or value is not None and not _can_write(value, words):
        value = UTF_8
    elif value is None and not all(map(str.isascii, words)):
        # pydicom decoded the bytes as Latin-1: declared so, the segmentation has the bytes of the source.
        value = "ISO_IR 100" if _can_write("ISO_IR 100", words) else UTF_8
        replaced["SpecificCharacterSet"] = f"missing although a text is not ASCII, now {value}"
    if value is not None:
        common.SpecificCharacterSet = value


def _is_legal_character_set(value: str | list[str]) -> bool:
    try:
        _bare_object(specific_character_set=value)
        convert_encodings(value)
    except Exception:  # highdicom and pydicom raise several kinds
        return False
    return True


def _can_write(character_set: str | list[str], texts: Iterable[str]) -> bool:
    encodings = convert_encodings(character_set)

    def fits(text: str, encoding: str) -> bool:
        try:
            text.encode(encoding)
        except UnicodeError:
            return False
        return True

    parts = {part for text in texts for part in re.split("[=^]", text)}  # each part of a name may switch the encoding
    return all(any(fits(part, encoding) for encoding in encodings) for part in parts)


def _texts_of(dataset: Dataset) -> list[str]:
    found = []
    for element in dataset.iterall():
        if element.VR != "SQ":
            values = element.value if isinstance(element.value, MultiValue) else [element.value]
            found += [str(value) for value in values if value is not None]
    return found


def _shown(header: Dataset, keyword: str) -> str:
    """Return a value for a message, as it is stored."""
    value = header.get_item(keyword).value
    if isinstance(value, bytes):
        value = value.decode("latin-1").strip("\0 ")
    elif isinstance(value, (MultiValue, list, tuple)):
        value = "\\".join(map(str, value))
    text = repr(str(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}...'"


# ---- identity ------------------------------------------------------------------------------------------------------


class _Identity:
    """UIDs of a series: those of its headers, and for a missing one a new one that follows from the content."""

    def __init__(self, files: Sequence[str], headers: Mapping[str, Dataset]) -> None:
        self.files, self.headers = files, headers
        self.instances = {file: _uid(headers[file], "SOPInstanceUID") for file in files}
        self.counts = Counter(self.instances.values())

    @functools.cached_property
    def key(self) -> list[str]:
        """Whatever distinguishes this series from all others. Without a UID of the series, that is only its content."""
        first = self.headers[self.files[0]]
        names = [_uid(first, keyword) for keyword in ("SeriesInstanceUID", "StudyInstanceUID")]
        return [*names, str(first.get("PatientID") or ""), "" if names[0] else _digest(self.files)]

    def shared(self, keyword: str, replaced: dict[str, str]) -> str:
        """Return the UID that all files of the series must share."""
        stored = list(dict.fromkeys(_uid(self.headers[file], keyword) for file in self.files))
        found = [uid for uid in stored if uid]
        if len(found) > 1:
            replaced[keyword] = f"{len(found)} values in one volume, now that of the first slice, {found[0]}"
        elif len(stored) > 1:
            replaced[keyword] = "missing in some files, now that of the others"
        if found:
            return found[0]
        uid = generate_uid(entropy_srcs=[keyword, *self.key])
        replaced[keyword] = f"{self._wrong(self.files[0], keyword)}, now {uid}"
        return uid

    def instance(self, file: str, replaced: dict[str, str]) -> str:
        """Return the UID of a file. Some anonymisers write one UID into all files: then it names no file."""
        uid = self.instances[file]
        if uid and self.counts[uid] == 1:
            return uid
        what = "the same in several files" if uid else self._wrong(file, "SOPInstanceUID")
        replaced["SOPInstanceUID"] = f"{what}, now new ones"
        place = self.headers[file].get("ImagePositionPatient") or self.files.index(file)
        return generate_uid(entropy_srcs=["SOPInstanceUID", uid, *self.key, str(place)])

    def _wrong(self, file: str, keyword: str) -> str:
        shown = _shown(self.headers[file], keyword) if keyword in self.headers[file] else "''"
        return "missing" if shown in ("''", "'None'") else f"{shown}, which is not a UID"


def _uid(header: Dataset, keyword: str) -> str:
    """Return a UID; "" if it is missing, empty or not a number in dots."""
    text = str(header.get(keyword) or "").strip("\0 ")
    return valid_uid(text)


def _digest(files: Sequence[str]) -> str:
    checksum = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            checksum.update(hashlib.file_digest(stream, "sha256").digest())
    return checksum.hexdigest()


# ---- grid ----------------------------------------------------------------------------------------------------------


def _places(slices: Sequence[Slice]) -> list[list[DSfloat]]:
    """Return the position of each slice on the grid, in mm (LPS)."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid_affine(slices)
    return [_decimals(affine[:3, 3] + index * affine[:3, 2], DECIMALS) for index in range(len(slices))]


def _set_thickness(common: Dataset, header: Dataset, slices: Sequence[Slice], replaced: dict[str, str]) -> None:
    keyword, group = "SliceThickness", "PixelMeasuresSequence"
    stored: Any = None
    try:
        stored = frame_element(header, slices[0].frame, group, keyword)
        thickness = float(stored)
    except Exception:  # not a number
        thickness = 0.0
    if not (thickness > 0 and math.isfinite(thickness)):
        step = np.linalg.norm(slices[-1].position - slices[0].position) / (len(slices) - 1)
        thickness = round(float(step), DECIMALS)
        if header.get_item(keyword) and header.get_item(keyword).value:
            shown = _shown(header, keyword)
        else:
            shown = "missing" if stored in (None, "") else repr(str(stored))
        replaced[keyword] = f"{shown}, now the distance of the slices, {thickness:g} mm"
    common.SliceThickness = DSfloat(thickness, auto_format=True)


def _set_grid(image: Dataset, first: Slice, places: list[list[DSfloat]], several: bool) -> None:
    """Give an image the orientation and spacing of the first slice, and these positions of its frames."""
    orientation, spacing = _decimals(first.directions.ravel(), 10), _decimals(first.spacing[::-1], 10)
    if not several:
        image.ImageOrientationPatient, image.PixelSpacing = orientation, spacing
        image.ImagePositionPatient = places[0]
        return
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = spacing, image.SliceThickness
    plane.ImageOrientationPatient = orientation
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    image.SharedFunctionalGroupsSequence = [shared]
    image.NumberOfFrames = len(places)
    groups = []
    for place in places:
        position, group = Dataset(), Dataset()
        position.ImagePositionPatient = place
        group.PlanePositionSequence = [position]
        groups.append(group)
    image.PerFrameFunctionalGroupsSequence = groups


def _is_multi_frame(header: Dataset) -> bool:
    return _uid(header, "SOPClassUID") not in ("", CTImageStorage)


def _decimals(numbers: Iterable[float], digits: int) -> list[DSfloat]:
    # + 0.0: a zero without a sign
    return [DSfloat(round(float(number), digits) + 0.0, auto_format=True) for number in numbers]
