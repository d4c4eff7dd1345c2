# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find the scans to segment: NIfTI files, a data list, or DICOM series, which are converted to NIfTI first."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from ...common.cases.failures import Failures
from ...common.data.case_names import case_name, case_names
from ...common.data.data_list import inference_scans
from ...common.data.list_forms.list_file import StrPath, first_file
from ...common.errors import InputError, NoScan, RefusedScan
from ...common.files import absolute_path
from ...common.scans.dicom_headers import is_dicom
from ...common.scans.dicom_series import read_series
from ...common.scans.meta_image import SUFFIXES as METAIMAGE
from ...common.scans.nifti import is_whole
from ...common.scans.nifti_writing import write_nifti
from ...common.scans.reading import read_scan
from ...common.scans.search import FOREIGN, IS_PACKED, PACKED, SLICE_SUFFIXES, Candidate, Found, find_candidates
from ...common.words import counted, sentence
from ..results.organ_volumes import TABLE, read_cases
from .left_out import scan_in_disguise
from .sources import Source, mask_of, read_sources, source_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentationInputs:
    """Scans to segment.

    Attributes:
        scans: items ``{"image": NIfTI file or list of files}``.
        series: for each NIfTI file made from a DICOM series, the files of the series in slice order.
        count: number of scans that were found, including those that are done or cannot be read.
        names: unique name of each image file, including those that are done: see `case_names`.
        sources: what each scan is made from, by its image file.
    """

    scans: list[dict[str, Any]]
    series: dict[str, tuple[str, ...]]
    count: int = 0
    names: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)


def segmentation_inputs(
    source: StrPath | Sequence[StrPath],
    *,
    output_dir: StrPath,
    failures: Failures,
    resume: bool = False,
    straighten_tilt: bool = False,
) -> SegmentationInputs:
    """Find the scans to segment.

    A file and a folder with a ``dataset.json`` are read by `data_list.inference_scans`. Any other folder is searched
    for scans at any depth, NIfTI and DICOM alike. Scans of equal file names are named by their folders, too. DICOM CT
    series (and MetaImage files) are converted on their own grid to ``output_dir/dicom/NAME.nii.gz``. Series that may be
    incomplete and files that cannot be read become `Failures`, and so does a scan that is named like a mask; what lies
    next to a CT and is not one (scout views, reports, other modalities) is left out with a line in the log.

    No mask in ``output_dir`` is replaced by that of another scan (`Source.may_become`): a scan whose name is taken gets
    another one.

    Args:
        source: a NIfTI file, a data list, a folder, or several of them.
        output_dir: folder of the masks.
        failures: takes the scans that cannot be read, and keeps what earlier runs could not do for other scans.
        resume: skip scans that an earlier run into ``output_dir`` has segmented: those in its table of volumes whose
            mask exists and is no older than the scan, which are unchanged (`Source.is_unchanged`), perhaps in another
            folder, and which lack nothing (`Failures.earlier`).
        straighten_tilt: resample scans of a tilted gantry (see `read_series`); False: they cannot be read.

    Raises:
        InputError: see `inference_scans`; or no scan can be read.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    output_dir = absolute_path(output_dir)
    cases = read_cases(output_dir / TABLE) if resume else {}
    lacking = failures.earlier() if resume else set()
    finished = {image: case for image, case in cases.items() if image not in lacking}
    found = _Inputs(output_dir, failures, finished, straighten_tilt, recorded=_with_masks(output_dir))
    for one in sources:
        if _is_listed(one):
            found.listed.append(one)
            continue
        try:
            searched = found.search(one)
        except InputError as error:
            if len(sources) == 1:
                raise
            found.fail(os.fspath(one), error)  # the other sources continue
            continue
        found.take(searched)
    if (found.failed or found.no_scans) and not found.listed and not found.skipped:
        raise InputError(
            f"{source}: none of its {found.failed + found.no_scans} series and files can be segmented; see the lines above "
            "for the reasons."
        )
    scans = inference_scans(found.listed, equal_names=True, may_be_missing=True) if found.listed else []
    asked = {first_file(scan): found.source_of(scan) for scan in scans}
    moved = _moved(found.recorded, asked, same_content=resume)
    todo = [scan for scan in scans if not found.is_done(first_file(scan), asked[first_file(scan)], moved)]
    if resume:
        done_before = counted(found.skipped + len(scans) - len(todo), "scan is", "scans are")
        logger.info("%s already segmented (%s)", done_before, Path(output_dir) / TABLE)
    names = _names(found.recorded, asked, moved)
    failures.keep_others({*found.tried, *asked}, searched=[one for one in sources if not _is_listed(one)])
    asked = {first_file(scan): asked[first_file(scan)] for scan in todo}
    return SegmentationInputs(todo, found.series, found.skipped + len(scans) + found.failed, names, asked)


@dataclass
class _Inputs:
    """What is found in the folders so far.

    Attributes:
        output_dir: folder of the masks.
        failures: takes what cannot be read.
        finished: name of each image that an earlier run has segmented, by its table.
        straighten_tilt: see `segmentation_inputs`.
        recorded: what the masks in the folder were made from, by image file.
        sources: converted file to what it is made from.
        listed: what `inference_scans` reads: files, and folders with a data list.
        series: converted file to its DICOM files in slice order.
        made: converted file to its source.
        shared: folders with several series.
        tried: files and folders of all scans, including those that are done or cannot be read.
        skipped, failed, no_scans: number of scans that are done, that failed, and of series that are not a CT volume.
    """

    output_dir: Path
    failures: Failures
    finished: Mapping[str, str]
    straighten_tilt: bool
    recorded: dict[str, Source] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    listed: list[StrPath] = field(default_factory=list)
    series: dict[str, tuple[str, ...]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    skipped: int = 0
    failed: int = 0
    no_scans: int = 0

    @property
    def converted(self) -> Path:
        """Folder of the converted scans."""
        return self.output_dir / "dicom"

    def fail(self, file: str, reason: Exception | str) -> None:
        """Note that a file or a series cannot be segmented."""
        self.failures.add(file, "mask", reason)
        self.tried.add(file)
        self.failed += 1

    def search(self, folder: StrPath) -> Found:
        """Search a folder without a data list, except for the output if that is inside.

        Raises:
            InputError: see `find_candidates`.
        """
        inside = os.path.realpath(Path(folder).expanduser()) == os.path.realpath(self.output_dir)
        return find_candidates(folder, skip=self.converted if inside else self.output_dir)

    def take(self, found: Found) -> None:
        """Take the scans of a searched folder, and note what cannot be segmented.

        Raises:
            InputError: two scans would be converted to one file.
        """
        packed = {file: reason for file, reason in found.left_out.items() if reason.startswith(IS_PACKED)}
        for file, reason in {**found.refused, **packed}.items():
            self.fail(file, reason)
        for file, reason in sorted(found.left_out.items() - packed.items()):
            if (scan := scan_in_disguise(file)) is not None:
                self.fail(file, f"{sentence(reason)} Its values are those of a scan, not of a mask ({scan})")
            else:
                logger.warning("%s is left out: it %s", file, reason)
        count = Counter(candidate.source for candidate in found.candidates)
        self.shared |= {source for source, number in count.items() if number > 1}
        for candidate in found.candidates:
            self._add(candidate)

    def _add(self, candidate: Candidate) -> None:
        if candidate.kind == "nifti":
            self.tried.add(candidate.source)
            self.listed.append(candidate.source)
            return
        source = source_of(candidate.source, candidate.files, series=candidate.series)
        file = self._converted_file(candidate.name, source)
        self.tried |= {candidate.source, file}
        if self.is_done(file, source):
            self.skipped += 1
        elif (other := self.made.setdefault(file, candidate.source)) != candidate.source:
            raise InputError(
                f"{other} and {candidate.source} would both be converted to {file}: one would replace the other. Pass them "
                "in two runs with different --output_dir, or the folder above both."
            )
        else:
            self._convert(candidate, file, source)

    def _converted_file(self, name: str, source: Source) -> str:
        """Return the file that a scan is converted to; not that of another scan that has a mask."""
        number, file = 1, str(self.converted / f"{name}.nii.gz")
        while (other := self.recorded.get(file)) is not None and other.identity and not other.may_become(source):
            number += 1
            file = str(self.converted / f"{name}-{number}.nii.gz")
        return file

    def source_of(self, scan: Mapping[str, Any]) -> Source:
        """Return what a scan of the run is made from."""
        file = first_file(scan)
        return self.sources.get(file) or source_of(file, ensure_tuple(scan["image"]))

    def is_done(self, file: str, source: Source, moved: Mapping[str, str] | None = None) -> bool:
        """Return whether a scan already has its mask, from an earlier run.

        Args:
            file: its image file.
            source: what it is made from.
            moved: see `_moved`.
        """
        known = (moved or {}).get(file, file)
        if known not in self.finished or file in self.sources:  # converted in this run, so it is not done
            return False
        mask = mask_of(self.output_dir, self.finished[known])
        if not (mask.exists() and os.path.exists(file) and os.path.getmtime(mask) >= os.path.getmtime(file)):
            return False
        if not is_whole(mask):
            logger.warning("the mask %s is damaged: its scan is segmented again", mask)
            return False
        if (recorded := self.recorded.get(known)) is None or recorded.is_unchanged(source):
            return True
        logger.warning("%s has changed since it was segmented: it is segmented again", source.source)
        return False

    def _convert(self, candidate: Candidate, file: str, source: Source) -> None:
        try:
            files = _converted(candidate, file, self.straighten_tilt)
        except NoScan as reason:
            logger.info("%s (%s) is left out: %s", candidate.source, candidate.name, reason)
            self.no_scans += 1
        except Exception as error:  # besides `RefusedScan`, what libraries raise for odd files
            several = candidate.series and candidate.source in self.shared
            self.fail(candidate.files[0] if several else candidate.source, error)
        else:
            self.listed.append(file)
            self.sources[file] = source
            self.series |= {file: files} if files else {}


def _is_listed(source: StrPath) -> bool:
    """Return whether `inference_scans` reads it: a file, or a folder with a data list."""
    path = Path(source).expanduser()
    if path.is_dir():
        return (path / "dataset.json").exists()
    return not (
        path.name.lower().endswith((*METAIMAGE, *SLICE_SUFFIXES, *FOREIGN, *PACKED))
        or (path.is_file() and is_dicom(path))
    )


def _with_masks(output_dir: Path) -> dict[str, Source]:
    """Return what the masks in a folder were made from, by image file."""
    return {
        image: source for image, source in read_sources(output_dir).items() if mask_of(output_dir, source.case).exists()
    }


def _moved(recorded: Mapping[str, Source], scans: Mapping[str, Source], *, same_content: bool) -> dict[str, str]:
    """Return for each scan that was moved the image under which its mask is recorded.

    Args:
        recorded: sources of the masks that are there.
        scans: those of the run.
        same_content: also compare the content with what is recorded. Files of an archive may have one size and time, and
            the scan of another patient must not count as done.
    """
    gone = {image: source for image, source in recorded.items() if not os.path.exists(source.source)}
    moved = {}
    for image, source in scans.items():
        if image in recorded:
            continue
        same = [other for other in gone if case_name(other) == case_name(image) and gone[other].may_become(source)]
        same = [other for other in same if not same_content or gone[other].has_content_of(source)]
        if same:
            moved[image] = same[0]
            del gone[same[0]]
    return moved


def _names(recorded: Mapping[str, Source], scans: Mapping[str, Source], moved: Mapping[str, str]) -> dict[str, str]:
    """Return a name for each image. Those of earlier runs stay; those of new scans differ from them.

    Args:
        recorded: sources of the masks that are there.
        scans: those of the run.
        moved: see `_moved`: these keep their names, too, and their masks are replaced.
    """
    names = {image: source.case for image, source in recorded.items()}
    names |= {image: names[other] for image, other in moved.items()}
    new, alone = case_names([*recorded, *scans]), case_names(scans)
    taken = set(names.values())
    for image in scans:
        if image not in names:
            name, number = new[image], 1
            while name in taken:  # by a scan that was moved
                number += 1
                name = f"{new[image]}-{number}"
            names[image] = name
            taken.add(name)
    if other := [image for image in scans if image not in recorded and names[image] != alone[image]]:
        logger.warning(
            "%s another name than before, since masks of other scans are there already: the mask of %s is %s. Use another "
            "--output_dir to have it under the name of its file",
            *(counted(len(other), "scan has", "scans have"), other[0], f"{names[other[0]]}_seg.nii.gz"),
        )
    return names


def _converted(candidate: Candidate, file: str, straighten_tilt: bool) -> tuple[str, ...]:
    """Convert a series, or a scan in another format, to NIfTI.

    Args:
        candidate: the scan.
        file: the NIfTI file to write.
        straighten_tilt: see `read_series`.

    Returns:
        The DICOM files in slice order; () for other formats.

    Raises:
        NoScan: it is not a CT volume, and none is missing.
        RefusedScan: it cannot be used.
    """
    if candidate.fault:
        raise RefusedScan(candidate.fault)
    if candidate.series:
        volume = read_series(candidate.series, straighten_tilt=straighten_tilt)
    else:
        volume = read_scan(candidate)
    write_nifti(file, voxels=volume.voxels, affine=volume.affine)
    logger.info("converted %s (%d slices) to %s", candidate.source, volume.voxels.shape[2], file)
    return volume.files if candidate.series else ()
