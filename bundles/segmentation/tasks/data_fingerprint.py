# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The fingerprint of a labelled data set: spacings, sizes, class volumes and intensities of the labelled voxels.

The name and the choice of properties follow nnU-Net (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.progress import track

from ...common.data.ignore_label import allowed_values
from ...common.data.label_values import whole_labels
from ...common.data.list_forms.list_file import first_file, image_files
from ...common.errors import InputError, RefusedScan
from ...common.run.distributed import rank
from ...common.scans.checks import LISTED, WHAT_TO_DO, check_scans
from ...common.scans.headers.axes import turned
from ...common.scans.nifti import check_finite, open_scan, stored_voxels
from ...common.words import counted

logger = logging.getLogger(__name__)

SAMPLE = 10_000  # intensities kept per channel of a scan; drawn at random if more voxels are labelled
SEED = 0


@dataclass(frozen=True, eq=False)
class ScanFacts:
    """The measurements of one scan. The axes are those of training: right, anterior, superior.

    Attributes:
        file: the image; its first file if it has several.
        spacing: mm.
        profiles: for each axis, the largest intensity (of any channel) in each plane across it. They determine the
            bounding box of the voxels above any threshold.
        class_voxels: int64 (classes,), number of voxels of each declared label value.
        intensities: float64, of labelled voxels, at most `SAMPLE` per channel, all channels together; may be empty.
    """

    file: str
    spacing: tuple[float, float, float]
    profiles: tuple[np.ndarray, np.ndarray, np.ndarray]
    class_voxels: np.ndarray
    intensities: np.ndarray

    def size_above(self, threshold: float) -> tuple[int, int, int]:
        """Return the size in voxels of the bounding box above a threshold; of the whole scan if nothing is."""
        above = [np.flatnonzero(profile > threshold) for profile in self.profiles]
        return tuple(
            int(planes[-1] - planes[0] + 1) if len(planes) else len(profile)
            for planes, profile in zip(above, self.profiles, strict=True)
        )


@dataclass(frozen=True, eq=False)
class DataFingerprint:
    """The measurements of all labelled scans, sorted by file name.

    Attributes:
        scans: measurements of each scan.
        labels: the declared label values, sorted: the classes.
    """

    scans: tuple[ScanFacts, ...]
    labels: tuple[int, ...]

    @property
    def spacings(self) -> np.ndarray:
        """Spacings in mm, float64 (scans, 3)."""
        return np.array([scan.spacing for scan in self.scans])

    def sizes_above(self, threshold: float) -> np.ndarray:
        """Return the sizes in voxels of the bounding boxes of the voxels above a threshold, int64 (scans, 3)."""
        return np.array([scan.size_above(threshold) for scan in self.scans])

    @property
    def class_volumes(self) -> np.ndarray:
        """Volume of each class in each scan in mm^3, float64 (scans, classes)."""
        return np.array([scan.class_voxels * np.prod(scan.spacing) for scan in self.scans])

    @property
    def intensities(self) -> np.ndarray:
        """Sampled intensities of the labelled voxels of all scans, float64."""
        return np.concatenate([scan.intensities for scan in self.scans])


def data_fingerprint(
    items: Sequence[dict],
    *,
    channels: int,
    labels: Iterable[int],
    ignore_label: int | None = None,
    intensities: bool,
    workers: int = 4,
) -> DataFingerprint:
    """Measure labelled scans. Each is read once; ``workers`` of them are in memory at a time.

    The same files give the same fingerprint in any order. In a distributed run every process must call it, and each
    measures all scans.

    Args:
        items: ``{"image": path or list of paths (one for each channel), "label": path}``.
        channels: number of channels of an image. Several channels in one file are its fourth axis.
        labels: values that a label may contain, including the background 0.
        ignore_label: value of unknown voxels, which are neither counted nor labelled voxels; None: there are none.
        intensities: also sample the intensities of labelled voxels. They are comparable between scans only in CT.
        workers: number of threads.

    Raises:
        InputError: some scans are unusable. Gives their number, and the first ones with the reason (see `check_scans`).
    """
    labels = tuple(sorted(labels))
    check_scans(items, channels=channels, labels=labels, voxels=False, workers=workers)
    facts, problems = [], []
    with ThreadPoolExecutor(workers) as pool:
        measured = pool.map(lambda item: _measure_or_explain(item, labels, ignore_label, intensities), items)
        for result in _with_progress(measured, len(items)):
            (facts if isinstance(result, ScanFacts) else problems).append(result)
    if problems:
        lines = [f"  {problem}" for problem in problems[:LISTED]]
        lines += [f"  and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise InputError("\n".join([f"{len(problems)} of {len(items)} scans are bad:", *lines, WHAT_TO_DO]))
    return DataFingerprint(tuple(sorted(facts, key=lambda scan: scan.file)), labels)


def _with_progress(results: Iterator, count: int) -> Iterable:
    if rank() == 0 and sys.stderr.isatty():
        return track(results, f"measuring {counted(count, 'scan')}", total=count, console=Console(stderr=True))
    if rank() == 0:
        logger.info("measuring %s", counted(count, "scan"))
    return results


def _measure_or_explain(
    item: dict, labels: tuple[int, ...], ignore_label: int | None, intensities: bool
) -> ScanFacts | str:
    """Return the measurements of a scan, or why it is unusable."""
    files = image_files(item)
    file = item["label"]  # the file being read, for the message
    try:
        label, class_voxels = _read_label(file, labels, ignore_label, like=open_scan(files[0]).affine)
        labelled = _draw_positions(label, seed=SEED) if intensities else np.array([], int)
        profiles, sampled = [], []
        for file in files:
            scan = open_scan(file)
            of_file, of_labelled = _read_image(scan, labelled)
            profiles.append(of_file)
            sampled += of_labelled
    except RefusedScan as error:
        return f"{file}: {error}"
    except Exception as error:  # nibabel, gzip, zlib and numpy raise many types of errors for broken files
        return f"{file}: cannot be read, perhaps damaged or cut short ({type(error).__name__}: {error})"
    spacing = nib.affines.voxel_sizes(scan.affine)
    axes = np.argsort(nib.io_orientation(scan.affine)[:, 0])  # the file's axes that run along R, A, S
    return ScanFacts(
        file=first_file(item),
        spacing=tuple(float(spacing[axis]) for axis in axes),
        profiles=tuple(np.max([of_file[axis] for of_file in profiles], axis=0) for axis in axes),
        class_voxels=class_voxels,
        intensities=np.concatenate([np.array([]), *sampled]),
    )


def _read_label(
    file: str, labels: tuple[int, ...], ignore_label: int | None, *, like: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the label map (X, Y, Z), 0 where it is unknown, and the number of known voxels of each value.

    Its axes run like those of the image, whose affine is ``like``.
    """
    scan = open_scan(file)
    raw, slope, inter = stored_voxels(scan)
    label = whole_labels(raw if (slope, inter) == (1.0, 0.0) else raw * slope + inter)
    label, _ = turned(label, scan.affine, like=like)
    counts = np.array([np.count_nonzero(label == value) for value in labels])
    unknown = None if ignore_label is None else label == ignore_label
    known = label.size if unknown is None else label.size - np.count_nonzero(unknown)
    if counts.sum() < known:
        wrong = np.setdiff1d(label, labels if ignore_label is None else (*labels, ignore_label))
        shown = ", ".join(f"{value:g}" for value in wrong[:10]) + (" ..." if len(wrong) > 10 else "")
        whole = "" if np.array_equal(wrong, np.round(wrong)) else "whole numbers, "
        raise RefusedScan(
            f"holds the label value{'s' * (len(wrong) > 1)} {shown}; allowed are {whole}{allowed_values(labels, ignore_label)}"
        )
    return label if known == label.size else np.where(unknown, 0, label), counts


def _draw_positions(label: np.ndarray, *, seed: int) -> np.ndarray:
    """Return flat positions of labelled voxels in Fortran order, as in NIfTI: all, or `SAMPLE` with replacement."""
    labelled = np.flatnonzero(label.ravel(order="F"))
    if len(labelled) <= SAMPLE:
        return labelled
    # RandomState: numpy guarantees the same stream in all versions.
    return labelled[np.random.RandomState(seed).randint(len(labelled), size=SAMPLE)]


def _read_image(scan: nib.spatialimages.SpatialImage, labelled: np.ndarray) -> tuple[list, list]:
    """Return the largest intensity in each plane across each axis of the file, and each channel's at ``labelled``."""
    raw, slope, inter = stored_voxels(scan)
    check_finite(raw, slope, inter)
    raw = raw.reshape((*raw.shape[:3], -1), order="F")
    greatest = np.max if slope > 0 else np.min
    over_channels = greatest(raw, axis=3)
    across_x = greatest(over_channels, axis=0)
    profiles = [greatest(over_channels, axis=(1, 2)), greatest(across_x, axis=1), greatest(across_x, axis=0)]
    sampled = [raw[..., channel].ravel(order="F")[labelled] for channel in range(raw.shape[3])]
    return [each * slope + inter for each in profiles], [each * slope + inter for each in sampled]
