# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Label maps as DICOM segmentations (SEG) beside the CT series that they were made from, for a PACS and its viewers."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from ...common.data.case_names import case_name
from ...common.errors import InputError
from ...common.files import atomic_path
from ...common.scans.dicom_series import read_headers
from ...common.scans.slice_grid import MAX_SHIFT, grid_affine, sort_slices
from ..models.label_names import organ_names
from .case_handler import CaseHandler
from .overlay import organ_colours

logger = logging.getLogger(__name__)
logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells of every attribute that it copies

# SNOMED CT, as pydicom has it from the standard; right and left are modifiers. The joined veins have no code of their
# own, so theirs says no more than is true.
ORGANS: dict[str, Code] = {
    "spleen": codes.SCT.Spleen,
    "kidney": codes.SCT.Kidney,
    "gallbladder": codes.SCT.Gallbladder,
    "esophagus": codes.SCT.Esophagus,
    "liver": codes.SCT.Liver,
    "stomach": codes.SCT.Stomach,
    "aorta": codes.SCT.Aorta,
    "inferior_vena_cava": codes.SCT.InferiorVenaCava,
    "portal_and_splenic_veins": codes.SCT.Vein,
    "pancreas": codes.SCT.Pancreas,
    "adrenal_gland": codes.SCT.AdrenalGland,
}
SIDES = {"right": codes.SCT.Right, "left": codes.SCT.Left}
SERIES_NUMBER = 9000  # beyond those of a scanner's own series; the number need not be unique
LONGEST_TEXT = 64  # characters of a DICOM long string (LO)
# What a source image may lack, being stripped of names, and highdicom copies: empty is allowed for all of them.
COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


def write_dicom_segmentation(
    path: str | os.PathLike,
    *,
    label_map: np.ndarray,
    labels: Mapping[int, str],
    files: Sequence[str],
    model_name: str,
    model_version: str,
) -> None:
    """Write the organs of a label map as one DICOM SEG, whole or not at all.

    Each organ that is present is a binary segment, numbered from 1 in the order of the label values, with its name, its
    SNOMED code and the colour of `overlay.organ_colours`. Patient, study and frame of reference are those of the source
    images, and every frame refers to its own.

    A SEG cannot be empty: of a label map without organs none is written, one of an earlier run is removed, and a
    warning is logged.

    Args:
        path: the file; parent folders are made.
        label_map: whole numbers (X, Y, Z) on the grid of the `DicomVolume` that `read_series` made of ``files``.
        labels: organ name of each label value; 0, the background, is left out.
        files: the source images in the order of Z, as in `DicomVolume`.
        model_name: what made the label map.
        model_version: its version.

    Raises:
        InputError: if the label map is not on the grid of the files, or has a value without a name.
    """
    names = organ_names(labels)
    headers = read_headers(files)
    slices = sort_slices(headers)
    shape = (*slices[0].shape, len(slices))
    if label_map.shape != shape:
        raise InputError(
            f"The label map for {path} has the shape {label_map.shape} and its DICOM series {shape}: give it in the "
            "geometry of the series."
        )
    if [one.file for one in slices] != list(files):
        raise InputError(f"The files for {path} are not in the order of their slices: give those of its DicomVolume.")
    segments, present = np.zeros(shape, dtype=np.uint8), []
    for value in sorted(names):
        organ = label_map == value
        if organ.any():
            present.append(value)
            segments[organ] = len(present)
    if np.count_nonzero(label_map) != np.count_nonzero(segments):
        unknown = sorted(set(np.unique(label_map).tolist()) - {0, *names})
        raise InputError(f"The label map for {path} has the values {unknown}, of which 'labels' has no name: {names}.")
    if not present:
        Path(path).unlink(missing_ok=True)
        logger.warning("No DICOM segmentation %s: the label map has no organ in it, and a SEG cannot be empty.", path)
        return

    planes = segments.transpose(2, 1, 0)  # (slices, rows, columns), as DICOM has them
    planes = planes[np.argsort([one.frame for one in slices], kind="stable")]  # a multi-frame image in its own order
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model_name[:LONGEST_TEXT], version=model_version[:LONGEST_TEXT], family=codes.DCM.ArtificialIntelligence
    )
    colours = organ_colours(names)
    segmentation = hd.seg.Segmentation(
        source_images=_sources(headers),
        pixel_array=planes,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe(number, names[value], algorithm, colours[value]) for number, value in enumerate(present, 1)
        ],
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="swin-unetr-bundles",
        manufacturer_model_name=model_name[:LONGEST_TEXT],
        software_versions=model_version[:LONGEST_TEXT],
        device_serial_number="none",
        content_label="ORGANS",
        series_description=f"Organs by {model_name}"[:LONGEST_TEXT],
    )
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)
    logger.info("wrote %s", path)


def _sources(headers: Mapping[str, Dataset]) -> list[Dataset]:
    """Return the source images, with an empty or new value for what highdicom needs and an anonymiser took away."""
    frame_of_reference = hd.UID()
    for header in headers.values():
        header.FrameOfReferenceUID = header.get("FrameOfReferenceUID") or frame_of_reference
        for keyword in COPIED:
            if keyword not in header:
                setattr(header, keyword, None)
    return list(headers.values())


def _describe(
    number: int, name: str, algorithm: hd.AlgorithmIdentificationSequence, colour: tuple[float, float, float]
) -> hd.seg.SegmentDescription:
    """Return the description of a segment: what it is, in words and in codes."""
    side, organ = re.fullmatch(r"(?:(right|left)_)?(.*)", name.lower().replace(" ", "_")).groups()
    category, kind = codes.SCT.AnatomicalStructure, ORGANS.get(organ, codes.SCT.AnatomicalStructure)
    if re.search("cancer|tumou?r", organ):
        category, kind = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:LONGEST_TEXT],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=hd.color.CIELabColor.from_rgb(*(round(255 * channel) for channel in colour)),
    )
    if side:
        modifier = hd.sr.CodedConcept.from_code(SIDES[side])
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description


class SaveDicomSegmentations(CaseHandler):
    """Handler of an evaluator: writes ``<case>_seg.dcm`` for each case whose image file was made from a DICOM series.

    Other cases are skipped. See `write_dicom_segmentation` for a case without organs.

    Args:
        series: image file of a case, as a path that is absolute or relative to the working folder, to the DICOM files
            that it was made from, in the order of `DicomVolume`.
        labels: organ name of each label value; text keys, as in a JSON file, are read as numbers.
        output_dir: the folder of the segmentations.
        metadata: the bundle's ``metadata.json``; its ``name`` and ``version`` are recorded as the maker of the files.
        keys: ``pred_key`` and ``image_key`` of `CaseHandler`.

    Raises:
        InputError: during the run, if a label map is missing or does not lie on the DICOM series.
    """

    def __init__(
        self,
        series: Mapping[str, Sequence[str]],
        labels: Mapping[int | str, str],
        output_dir: str | Path,
        metadata: str,
        **keys: str,
    ) -> None:
        super().__init__(output_dir, **keys)
        self.series = {os.path.abspath(file): list(sources) for file, sources in series.items()}
        self.labels = {int(value): str(organ) for value, organ in labels.items()}
        content = json.loads(Path(metadata).read_text(encoding="utf-8"))
        self.model_name, self.model_version = content["name"], content["version"]

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Write one case."""
        files = self.series.get(os.path.abspath(file))
        if files is None:
            return
        label_map = self.label_map(item, self.pred_key, file)
        try:
            write_dicom_segmentation(
                self.output_dir / f"{case_name(file)}_seg.dcm",
                label_map=_on_slices(label_map, files),
                labels=self.labels,
                files=files,
                model_name=self.model_name,
                model_version=self.model_version,
            )
        except InputError as error:
            raise InputError(f"No DICOM segmentation of the case {case_name(file)} ({file}): {error}") from error


def _on_slices(label_map: MetaTensor, files: Sequence[str]) -> np.ndarray:
    """Return a label map (1, X, Y, Z) on the grid of a DICOM series: axes swapped and flipped, never resampled."""
    affine = grid_affine(sort_slices(read_headers(files)))
    given = label_map.affine.numpy(force=True).astype(np.float64)
    turn = nib.orientations.ornt_transform(nib.io_orientation(given), nib.io_orientation(affine))
    voxels = nib.apply_orientation(label_map[0].numpy(force=True), turn)
    turned = given @ nib.orientations.inv_ornt_aff(turn, label_map.shape[1:])
    far = np.array(np.meshgrid(*[(0, size - 1) for size in voxels.shape], [1])).reshape(4, -1)  # its eight corners
    shift = np.linalg.norm(((turned - affine) @ far)[:3], axis=0).max()
    if shift > MAX_SHIFT:
        raise InputError(
            f"the label map lies {shift:.1f} mm beside the DICOM series: invert the transforms of the scan, or check "
            "that the image file was made from this series"
        )
    return voxels
