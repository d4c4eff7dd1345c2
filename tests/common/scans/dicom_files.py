# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Hand-made DICOM series with a known grid: the judge of what a reader makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
POSITION = (-120.25, -98.5, 310.75)
SPACING = (0.75, 0.5, 2.5)
STUDY_UID = generate_uid(entropy_srcs=["study"])
FRAME_OF_REFERENCE_UID = generate_uid(entropy_srcs=["frame of reference"])


def write_series(
    folder: Path,
    stored: np.ndarray,
    *,
    orientation: Sequence[float] = AXIAL,
    position: Sequence[float] = POSITION,
    spacing: Sequence[float] = SPACING,
    offsets: Sequence[float] | None = None,
    tilt: float = 0.0,
    slope: float | Sequence[float] = 1.0,
    intercept: float | Sequence[float] = -1024.0,
    unsigned: bool = False,
    bits: int = 16,
    suffix: str = ".dcm",
    seed: int | None = 0,
    syntax: str = ExplicitVRLittleEndian,
    edit: Callable[[Dataset, int], Any] | None = None,
    **tags: Any,
) -> list[Path]:
    """Write one single-frame CT image a slice, with names that are not in the order of the slices.

    Args:
        folder: where the files go; made if need be.
        stored: stored values (X, Y, Z): columns, rows, slices along the normal (row direction x column direction).
        orientation: ImageOrientationPatient.
        position: ImagePositionPatient of the first slice, in mm (LPS).
        spacing: mm along X, Y, Z.
        offsets: mm from the first slice to each, along the normal; None: steps of ``spacing[2]``.
        tilt: degrees between the normal and the direction of stacking, which leans towards the columns' direction.
        slope: RescaleSlope, of all slices or of each.
        intercept: RescaleIntercept, of all slices or of each.
        unsigned: store unsigned values.
        bits: BitsStored.
        suffix: of the file names.
        seed: shuffles the file names; None numbers them in the order of the slices.
        syntax: transfer syntax; a compressed one takes an encoder of pydicom.
        edit: is called with each data set and its slice index before the file is written.
        tags: further elements of all files, by keyword; None leaves an element out.

    Returns:
        The files in the order of the slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = stored.shape[2]
    offsets = [z * spacing[2] for z in range(count)] if offsets is None else offsets
    names = list(range(count))
    random.Random(seed).shuffle(names) if seed is not None else None
    row, column = np.reshape(orientation, (2, 3))
    lean = np.cross(row, column) + np.tan(np.radians(tilt)) * column
    common = {
        "PatientID": "patient 7",
        "PatientName": "Doe^Jane",
        "StudyInstanceUID": STUDY_UID,
        "SeriesInstanceUID": generate_uid(entropy_srcs=["series", str(folder)]),
        "FrameOfReferenceUID": FRAME_OF_REFERENCE_UID,
        "SeriesDescription": "abdomen",
    }
    files = []
    for z in range(count):
        dataset = ct_image(stored[:, :, z], unsigned=unsigned, bits=bits)
        dataset.ImageOrientationPatient = decimals(orientation)
        dataset.ImagePositionPatient = decimals(np.add(position, offsets[z] * lean))
        dataset.PixelSpacing = decimals((spacing[1], spacing[0]))  # between rows, then between columns
        dataset.SliceThickness = spacing[2]
        dataset.InstanceNumber = z + 1
        dataset.RescaleSlope = decimals(np.broadcast_to(slope, count)[z : z + 1])[0]
        dataset.RescaleIntercept = decimals(np.broadcast_to(intercept, count)[z : z + 1])[0]
        for keyword, value in (common | tags).items():
            set_or_remove(dataset, keyword, value)
        if edit is not None:
            edit(dataset, z)
        files.append(folder / f"image{names[z]:04}{suffix}")
        write(dataset, files[-1], syntax)
    return files


def write_enhanced(
    file: Path,
    stored: np.ndarray,
    *,
    orientation: Sequence[float] = AXIAL,
    position: Sequence[float] = POSITION,
    spacing: Sequence[float] = SPACING,
    slope: Sequence[float],
    intercept: Sequence[float],
    order: Sequence[int],
    legacy: bool = False,
) -> Path:
    """Write one Enhanced (multi-frame) CT image; ``order`` lists the slices in the order of the frames.

    The other arguments are those of `write_series`; slope and intercept of each slice.
    """
    dataset = ct_image(stored[:, :, 0], unsigned=False, bits=16)
    dataset.SOPClassUID = LegacyConvertedEnhancedCTImageStorage if legacy else EnhancedCTImageStorage
    dataset.PixelData = b"".join(pixel_bytes(stored[:, :, z]) for z in order)
    dataset.NumberOfFrames = len(order)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.PatientID, dataset.PatientName, dataset.InstanceNumber = "patient 7", "Doe^Jane", 1
    dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = STUDY_UID, FRAME_OF_REFERENCE_UID
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["series", str(file)])
    shared, per_frame = Dataset(), []
    shared.PlaneOrientationSequence = [items(ImageOrientationPatient=decimals(orientation))]
    shared.PixelMeasuresSequence = [items(PixelSpacing=decimals((spacing[1], spacing[0])), SliceThickness=spacing[2])]
    normal = np.cross(*np.reshape(orientation, (2, 3)))
    for z in order:
        place = decimals(np.add(position, z * spacing[2] * normal))
        rescale = items(RescaleSlope=slope[z], RescaleIntercept=intercept[z], RescaleType="HU")
        per_frame.append(
            items(
                PlanePositionSequence=[items(ImagePositionPatient=place)],
                PixelValueTransformationSequence=[rescale],
                FrameContentSequence=[items(StackID="1", InStackPositionNumber=z + 1, DimensionIndexValues=[1, z + 1])],
            )
        )
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = per_frame
    file.parent.mkdir(parents=True, exist_ok=True)
    write(dataset, file, ExplicitVRLittleEndian)
    return file


def ct_image(plane: np.ndarray, *, unsigned: bool, bits: int) -> Dataset:
    """Return a CT image of the stored values (columns, rows), without place and without names."""
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = plane.shape[::-1]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = 0 if unsigned else 1
    dataset.PixelData = pixel_bytes(plane)
    # Present but empty, as the standard asks of every image of a study (type 2).
    for keyword in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"):
        setattr(dataset, keyword, "")
    dataset.ReferringPhysicianName = ""
    dataset.SeriesNumber = 3
    return dataset


def pixel_bytes(plane: np.ndarray) -> bytes:
    """Return stored values (columns, rows) as the format lays them out: 16 bits, row after row."""
    return (plane.T.astype(np.int64) & 0xFFFF).astype("<u2").tobytes()


def write(dataset: Dataset, file: Path, syntax: str) -> None:
    """Write a DICOM file, compressed if the transfer syntax asks for it."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or generate_uid()
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(file, enforce_file_format=True)


def items(**elements: Any) -> Dataset:
    """Return a data set of these elements, for a sequence."""
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def set_or_remove(dataset: Dataset, keyword: str, value: Any) -> None:
    """Set an element, or remove it if the value is None."""
    if value is not None:
        setattr(dataset, keyword, value)
    elif keyword in dataset:
        delattr(dataset, keyword)


def decimals(numbers: Sequence[float]) -> list[DSfloat]:
    """Return decimal strings of at most 16 characters, all that the format stores."""
    return [DSfloat(float(number), auto_format=True) for number in numbers]
