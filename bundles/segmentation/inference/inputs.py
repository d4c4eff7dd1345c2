# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What is to be segmented: NIfTI files, a data list, or DICOM series, which are written as NIfTI first."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.data.case_names import case_name
from ...common.data.data_list import StrPath, first_file, inference_scans
from ...common.data.nifti_files import is_scan
from ...common.errors import InputError, RefusedScan
from ...common.scans.dicom_series import read_series
from ...common.scans.nifti_writing import write_nifti
from ...common.scans.reading import read_scan
from ...common.scans.search import Candidate, find_candidates
from ..results.organ_volumes import TABLE, read_volumes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentationInputs:
    """Scans to segment.

    Attributes:
        scans: items ``{"image": NIfTI file or list of files}``.
        series: NIfTI file that was made of a DICOM series, to the files of the series in the order of the slices.
    """

    scans: list[dict[str, Any]]
    series: dict[str, tuple[str, ...]]


def segmentation_inputs(
    source: StrPath | Sequence[StrPath], *, output_dir: StrPath, resume: bool = False
) -> SegmentationInputs:
    """Find what is to be segmented.

    A folder that holds NIfTI files or a ``dataset.json`` is taken as `data_list.inference_scans` does. Of any other folder every scan at any depth
    is taken; CT series of DICOM (and MetaImage) are written to ``output_dir/dicom/NAME.nii.gz`` on their own grid. Series that are no CT volume,
    or may be incomplete, and files that cannot be read are left out, each with a warning that says why.

    Args:
        source: a NIfTI file, a data list, a folder, or several of them.
        output_dir: where the masks go.
        resume: leave out scans that an earlier run into ``output_dir`` has segmented: those in its table of volumes whose mask is there and no
            older than the scan.

    Raises:
        InputError: see `inference_scans`; or every series was left out.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    folder = Path(output_dir).expanduser().absolute() / "dicom"
    done = _segmented(Path(output_dir)) if resume else set()
    listed: list[StrPath] = []
    series: dict[str, tuple[str, ...]] = {}
    skipped = refused = 0
    for one in sources:
        found = None if _is_listed(one) else find_candidates(one, skip=output_dir)
        if found is None or all(candidate.kind == "nifti" for candidate in found.candidates):
            listed.append(one)
            continue
        for file, reason in found.refused.items():
            logger.warning("%s is left out: %s", file, reason)
        for candidate in found.candidates:
            file = candidate.source if candidate.kind == "nifti" else str(folder / f"{candidate.name}.nii.gz")
            if file in done:
                skipped += 1
            elif candidate.kind == "nifti":
                listed.append(file)
            elif (files := _converted(candidate, file)) is None:
                refused += 1
            else:
                listed.append(file)
                series |= {file: files} if files else {}
    if refused and not listed and not skipped:
        raise InputError(f"{source}: none of its {refused} series can be segmented; the reasons stand above.")
    scans = inference_scans(listed) if listed else []
    todo = [scan for scan in scans if first_file(scan) not in done]
    if resume:
        logger.info("%d scans are segmented already (%s)", skipped + len(scans) - len(todo), Path(output_dir) / TABLE)
    return SegmentationInputs(todo, series)


def _is_listed(source: StrPath) -> bool:
    """Whether `inference_scans` finds scans without searching: a file, or a folder with NIfTI files or a data list in it."""
    path = Path(source).expanduser()
    return not path.is_dir() or any(is_scan(name) or name == "dataset.json" for name in os.listdir(path))


def _segmented(output_dir: Path) -> set[str]:
    """Images that an earlier run has segmented: in its table, the mask there and no older than the image."""
    images = set()
    for image in read_volumes(output_dir / TABLE):
        mask = output_dir / f"{case_name(image)}_seg.nii.gz"
        if mask.exists() and os.path.exists(image) and os.path.getmtime(mask) >= os.path.getmtime(image):
            images.add(image)
    return images


def _converted(candidate: Candidate, file: str) -> tuple[str, ...] | None:
    """Write a series, or a scan of another format, as NIfTI.

    Args:
        candidate: the scan.
        file: the NIfTI file.

    Returns:
        The DICOM files in the order of the slices, () of another format, None where it is refused.
    """
    try:
        if candidate.fault:
            raise RefusedScan(candidate.fault)
        volume = read_series(candidate.series) if candidate.series else read_scan(candidate)
    except RefusedScan as reason:
        logger.warning("%s (%s) is left out: %s", candidate.source, candidate.name, reason)
        return None
    write_nifti(file, voxels=volume.voxels, affine=volume.affine)
    logger.info("%s: %d slices, as %s", candidate.source, volume.voxels.shape[2], file)
    return volume.files if candidate.series else ()
