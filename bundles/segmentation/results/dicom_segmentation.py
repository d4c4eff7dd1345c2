# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write label maps as DICOM segmentations (SEG) that refer to their source CT series, for a PACS and its viewers."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from ...common.cases.case_handler import CaseHandler
from ...common.errors import InputError, RefusedScan
from ...common.files import atomic_path
from ...common.scans.dicom_headers import first_line, read_headers
from ...common.scans.slice_grid import MAX_SHIFT, grid_affine, sort_slices
from ..models.label_names import organ_names
from .dicom_source import highdicom, segmentation_source
from .overlay import organ_colours

if TYPE_CHECKING:
    import highdicom as hd

logger = logging.getLogger(__name__)
logging.getLogger("highdicom").setLevel(logging.WARNING)  # it logs every attribute that it copies

# SNOMED CT codes, as listed in pydicom from the standard; right and left are modifiers. There is no single code for the
# portal and splenic veins together, so they get the general code for a vein.
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
SERIES_NUMBER = 9000  # above the numbers of a scanner's own series; it need not be unique
LONGEST_TEXT = 64  # maximum length of a DICOM long string (LO)


def write_dicom_segmentation(
    path: str | os.PathLike,
    *,
    label_map: np.ndarray,
    labels: Mapping[int, str],
    files: Sequence[str],
    model_name: str,
    model_version: str,
) -> None:
    """Write the organs of a label map as one DICOM SEG. The file is written atomically.

    Each organ that is present becomes a binary segment with its name, its SNOMED code and the colour of
    `overlay.organ_colours`. Segments are numbered from 1 in the order of the label values. Patient, study and frame of
    reference are those of the source images, and every frame refers to its source image. Values of the source images
    that the standard does not allow are replaced (see `segmentation_source`), and a warning names them.

    A SEG cannot be empty. For a label map without organs no file is written, the file of an earlier run is removed, and
    a warning is logged.

    Args:
        path: the file; parent folders are created.
        label_map: whole numbers (X, Y, Z) on the grid of the `DicomVolume` that `read_series` returns for ``files``.
        labels: organ name of each label value; the background 0 is ignored.
        files: the source images in the order of Z, as in `DicomVolume`.
        model_name: name of the model that produced the label map.
        model_version: version of the model.

    Raises:
        InputError: the label map has a value without a name.
        RefusedScan: the label map is not on the grid of the files, or the file cannot be written, for whatever reason.
            That of an earlier run is removed: it would belong to another label map.
    """
    try:
        _write(path, label_map, labels, files, _long_string(model_name), _long_string(model_version))
    except Exception as error:  # highdicom and pydicom raise many kinds; a full disk is one more
        if isinstance(error, InputError) and not isinstance(error, RefusedScan):
            raise
        Path(path).unlink(missing_ok=True)
        if isinstance(error, RefusedScan):
            raise
        raise RefusedScan(f"it cannot be written ({type(error).__name__}: {first_line(error)})") from error


def _write(
    path: str | os.PathLike,
    label_map: np.ndarray,
    labels: Mapping[int, str],
    files: Sequence[str],
    model_name: str,
    model_version: str,
) -> None:
    names = organ_names(labels)
    headers = read_headers(files)
    slices = sort_slices(headers)
    shape = (*slices[0].shape, len(slices))
    if label_map.shape != shape:
        raise RefusedScan(
            f"The label map for {path} has the shape {label_map.shape}, its DICOM series {shape}: it must be in the "
            "geometry of the series."
        )
    if [one.file for one in slices] != list(files):
        raise RefusedScan(
            f"The files for {path} are not in the order of their slices: pass the files of the DicomVolume."
        )
    segments, present = np.zeros(shape, dtype=np.uint8), []
    for value in sorted(names):
        organ = label_map == value
        if organ.any():
            present.append(value)
            segments[organ] = len(present)
    if np.count_nonzero(label_map) != np.count_nonzero(segments):
        unknown = sorted(set(np.unique(label_map).tolist()) - {0, *names})
        raise InputError(f"The label map for {path} has the values {unknown}, which have no name in 'labels': {names}.")
    if not present:
        Path(path).unlink(missing_ok=True)
        logger.warning("No DICOM segmentation %s: the label map has no organ, and a SEG cannot be empty.", path)
        return

    planes = segments.transpose(2, 1, 0)  # (slices, rows, columns), as in DICOM
    source = segmentation_source(slices, headers, [*names.values(), model_name, model_version])
    if len(source.images) == 1:  # the frames of one file, in their own order
        planes = planes[np.argsort([one.frame for one in slices], kind="stable")]
    hd = highdicom()
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model_name, version=model_version, family=codes.DCM.ArtificialIntelligence
    )
    colours = organ_colours(names)
    segmentation = hd.seg.Segmentation(
        **source.arguments,
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
        manufacturer_model_name=model_name,
        software_versions=model_version,
        device_serial_number="none",
        content_label="ORGANS",
        series_description=_long_string(f"Organs by {model_name}"),
    )
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)
    logger.info("wrote %s", path)
    if source.replaced:
        values = "; ".join(f"{keyword} {change}" for keyword, change in sorted(source.replaced.items()))
        logger.warning("%s: replaced what the DICOM standard does not allow in its source images: %s", path, values)


def _describe(
    number: int, name: str, algorithm: hd.AlgorithmIdentificationSequence, colour: tuple[float, float, float]
) -> hd.seg.SegmentDescription:
    """Return the description of a segment, with its name and codes."""
    side, organ = re.fullmatch(r"(?:(right|left)_)?(.*)", name.lower().replace(" ", "_")).groups()
    category, kind = codes.SCT.AnatomicalStructure, ORGANS.get(organ, codes.SCT.AnatomicalStructure)
    if re.search("cancer|tumou?r", organ):
        category, kind = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm
    hd = highdicom()
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=_long_string(name),
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


def _long_string(text: str) -> str:
    """Return a text as a DICOM long string (LO): short enough, without the backslash, which separates values."""
    return text.replace("\\", "/")[:LONGEST_TEXT].strip()


class SaveDicomSegmentations(CaseHandler):
    """Handler of an evaluator: writes ``<case>_seg.dcm`` for each case whose image file was made from a DICOM series.

    Other cases are skipped. See `write_dicom_segmentation` for a case without organs.

    Args:
        series: for the image file of each case (absolute, or relative to the working folder), the DICOM files that it
            was made from, in the order of `DicomVolume`.
        labels: organ name of each label value; text keys, as in a JSON file, are read as numbers.
        output_dir: the folder of the segmentations.
        metadata: the bundle's ``metadata.json``; its ``name`` and ``version`` are recorded as the model.
        options: ``pred_key``, ``image_key`` and ``failures`` of `CaseHandler`.

    Raises:
        InputError: there are series, and highdicom is not installed; or, during the run, if a label map is missing, has
            a value without a name, or cannot be written as a DICOM segmentation. With ``failures`` the run continues.
    """

    product = "DICOM SEG"

    def __init__(
        self,
        series: Mapping[str, Sequence[str]],
        labels: Mapping[int | str, str],
        output_dir: str | Path,
        metadata: str,
        **options: Any,
    ) -> None:
        super().__init__(output_dir, **options)
        self.series = {os.path.abspath(file): list(sources) for file, sources in series.items()}
        self.labels = {int(value): str(organ) for value, organ in labels.items()}
        if self.series:
            highdicom()  # missing: better reported before the scans are segmented
        content = json.loads(Path(metadata).read_text(encoding="utf-8"))
        self.model_name, self.model_version = content["name"], content["version"]

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Write one case."""
        files = self.series.get(os.path.abspath(file))
        if files is None:
            return
        label_map = self.label_map(item, self.pred_key, file)
        path = self.output_dir / f"{self.name_of(file)}_seg.dcm"
        try:
            write_dicom_segmentation(
                path,
                label_map=_on_slices(label_map, files),
                labels=self.labels,
                files=files,
                model_name=self.model_name,
                model_version=self.model_version,
            )
        except Exception:
            path.unlink(missing_ok=True)  # the file of an earlier run
            raise


def _on_slices(label_map: MetaTensor, files: Sequence[str]) -> np.ndarray:
    """Return a label map (1, X, Y, Z) on the grid of a DICOM series: axes swapped and flipped, never resampled.

    Raises:
        RefusedScan: the series cannot be read, or lies elsewhere.
    """
    affine = grid_affine(sort_slices(read_headers(files)))
    map_affine = label_map.affine.numpy(force=True).astype(np.float64)
    turn = nib.orientations.ornt_transform(nib.io_orientation(map_affine), nib.io_orientation(affine))
    voxels = nib.apply_orientation(label_map[0].numpy(force=True), turn)
    turned = map_affine @ nib.orientations.inv_ornt_aff(turn, label_map.shape[1:])
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in voxels.shape], [1])).reshape(4, -1)
    shift = np.linalg.norm(((turned - affine) @ corners)[:3], axis=0).max()
    if shift > MAX_SHIFT:
        raise RefusedScan(
            f"the label map is displaced by {shift:.1f} mm from the DICOM series: invert the transforms of the scan, or "
            "check that the image file was made from this series"
        )
    return voxels
