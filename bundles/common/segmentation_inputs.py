# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What is to be segmented: NIfTI files, a data list, or DICOM series, which are written as NIfTI first."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data_list import StrPath, inference_scans, is_scan
from .dicom_series import read_series
from .input_error import InputError
from .nifti_file import write_nifti
from .organ_volumes import TABLE, read_volumes
from .refused_scan import RefusedScan
from .scan_sources import Candidate, find_candidates

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

    A folder that holds NIfTI files or a ``dataset.json`` is taken as `data_list.inference_scans` does. Of any other folder every CT series of
    DICOM at any depth is taken, written to ``output_dir/dicom/NAME.nii.gz`` on the series' own grid; series that are no CT volume are left
    out, with a warning that says why.

    Args:
        source: a NIfTI file, a data list, a folder, or several of them.
        output_dir: where the masks go.
        resume: leave out scans that an earlier run into ``output_dir`` has segmented: those in its table of volumes.

    Raises:
        InputError: see `inference_scans`; or every series was left out.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    folder = Path(output_dir).expanduser().absolute() / "dicom"
    done = set(read_volumes(Path(output_dir) / TABLE)) if resume else set()
    listed, series, skipped = [], {}, 0
    for one in sources:
        found = (
            []
            if _is_listed(one)
            else [c for c in find_candidates(one, skip=output_dir).candidates if c.kind == "dicom"]
        )
        if not found:
            listed.append(one)
            continue
        todo = {_file(folder, candidate): candidate for candidate in found}
        skipped += len(done & todo.keys())
        made = {file: _converted(candidate, file) for file, candidate in todo.items() if file not in done}
        if made and not any(made.values()):
            raise InputError(f"{one}: none of its {len(made)} DICOM series can be segmented; the reasons stand above.")
        series |= {file: files for file, files in made.items() if files}
    scans = inference_scans([*listed, *series]) if listed or series else []
    todo = [scan for scan in scans if _first_file(scan) not in done]
    if resume:
        logger.info("%d scans are segmented already (%s)", skipped + len(scans) - len(todo), Path(output_dir) / TABLE)
    return SegmentationInputs(todo, series)


def _is_listed(source: StrPath) -> bool:
    """Whether `inference_scans` finds scans without searching: a file, or a folder with NIfTI files or a data list in it."""
    path = Path(source).expanduser()
    return not path.is_dir() or any(is_scan(name) or name == "dataset.json" for name in os.listdir(path))


def _file(folder: Path, candidate: Candidate) -> str:
    return str(folder / f"{candidate.name}.nii.gz")


def _converted(candidate: Candidate, file: str) -> tuple[str, ...]:
    """Write a series as NIfTI; returns its files in the order of the slices, none where it is refused."""
    try:
        volume = read_series(candidate.series)
    except RefusedScan as reason:
        logger.warning("%s (%s) is left out: %s", candidate.source, candidate.name, reason)
        return ()
    write_nifti(file, voxels=volume.voxels, affine=volume.affine)
    logger.info("%s: series of %d slices, as %s", candidate.source, volume.voxels.shape[2], file)
    return volume.files


def _first_file(scan: dict[str, Any]) -> str:
    return scan["image"] if isinstance(scan["image"], str) else scan["image"][0]
