# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check all scans before training starts, and name those that are unfit.

One truncated file ends a run of several days with a worker's traceback. One shifted label or one NaN spoils it
silently.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.progress import track

from ..data.ignore_label import IGNORE_LABEL, allowed_values
from ..data.label_values import whole_labels
from ..errors import InputError, RefusedScan
from ..files import file_stamp, write_text
from ..run.distributed import gather_lists, rank, world_size
from ..words import counted
from .decode_once import voxels_once
from .headers.axes import in_ras
from .headers.nifti_grid import corner_shift, is_aligned
from .hounsfield import doubt_of_hounsfield
from .nifti import _without_trailing_ones, check_finite, check_image_shape, open_scan, stored_voxels

logger = logging.getLogger(__name__)

LISTED = 10  # number of bad scans that the message names
WHAT_TO_DO = (
    "Fix these files, or leave them out (their entries in the data list; without one, both files), and start again."
)

ReadVoxels = Callable[[nib.spatialimages.SpatialImage, str], tuple[np.ndarray, float, float]]

SAMPLE = 1_000_000  # voxels used to estimate the percentiles of a scan
AT_ONCE = 32  # scans that each rank checks before the ranks exchange results


def check_scans(
    items: Sequence[dict],
    *,
    channels: int = 1,
    labels: Iterable[int] | None = None,
    ignore_label: int | None = None,
    voxels: bool = True,
    hounsfield: bool = False,
    workers: int = 8,
    remember: str | os.PathLike | None = None,
    keep: bool = False,
) -> None:
    """Open every image and label, and raise an error if any of them is unfit for training.

    `examine_scans` does the same work, but returns what is wrong with which scan.

    In a distributed run, each rank checks its share.

    Images must be readable NIfTI files with a usable affine, a plausible size (see `open_scan`) and finite voxels. Their
    shape must be (X, Y, Z) for one channel; for several, (X, Y, Z, C) or a list of C files (X, Y, Z). A label must have
    shape (X, Y, Z), be on the grid of its image once both are turned to RAS (see `is_aligned`), and contain
    only allowed values, to within 0.001 (see `whole_labels`).

    Args:
        items: ``{"image": path or list of paths, "label": path}``; ``label`` is optional.
        channels: number of image channels that the network expects.
        labels: values allowed in a label; None: all whole numbers from 0.
        ignore_label: value of unknown voxels, which is allowed, too.
        voxels: also read the voxels, not only the headers. This decompresses every file once.
        hounsfield: the images should be CT in HU: warn about those that do not look like it (only if voxels are read).
        workers: number of threads.
        remember: JSON file that records the scans that passed, with file sizes and times, so that the next run skips
            them.
        keep: keep voxels in memory for the next reader of the scans (see `decode_once`), as far as there is room.

    Raises:
        InputError: some scans are bad. The message counts them, names the first `LISTED` with what is wrong, and says
            what to do.
    """
    options = {"channels": channels, "labels": labels, "ignore_label": ignore_label, "voxels": voxels}
    options |= {"hounsfield": hounsfield, "workers": workers, "remember": remember, "keep": keep}
    items = list(items)
    problems = _examine(items, **options)
    bad = [problem for problem in problems if problem]
    if bad:
        lines = [f"  {problem}" for problem in bad[:LISTED]]
        lines += [f"  and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        raise InputError("\n".join([f"{len(bad)} of {len(items)} scans are bad:", *lines, WHAT_TO_DO]))


def examine_scans(items: Sequence[dict], **options: Any) -> tuple[list[dict], dict[str, str]]:
    """Open every image and label, and separate good scans from bad ones, so that a run can continue without these.

    In a distributed run, each rank checks its share, and all ranks return the same.

    Args:
        items: those of `check_scans`.
        options: those of `check_scans`.

    Returns:
        The good items in their order, and what is wrong with each bad one, by its first image file. A reason that
        concerns another file, such as the label, begins with the name of that file.
    """
    items = list(items)
    good, reasons = [], {}
    for item, problem in zip(items, _examine(items, **options), strict=True):
        if problem is None:
            good.append(item)
        else:
            first = _files(item)[0]
            reasons[first] = problem.removeprefix(f"{first}: ")
    return good, reasons


def _examine(
    items: list[dict],
    *,
    channels: int = 1,
    labels: Iterable[int] | None = None,
    ignore_label: int | None = None,
    voxels: bool = True,
    hounsfield: bool = False,
    workers: int = 8,
    remember: str | os.PathLike | None = None,
    keep: bool = False,
) -> list[str | None]:
    """Return "file: what is wrong" for each item, None for a good one. For the arguments, see `check_scans`."""
    if labels is not None:
        labels = sorted(int(value) for value in labels)
    read = voxels_once if keep else lambda scan, file: stored_voxels(scan)
    passed = _read_passed(remember)
    allowed = labels if labels is None or ignore_label is None else [*labels, ignore_label]
    keys = [_key(item, channels, allowed, voxels) for item in items]
    todo = [i for i, key in enumerate(keys) if key not in passed or passed[key] != _stamps(items[i])]
    todo = gather_lists([todo])[0]  # rank 0 decides: other ranks may see another disk
    shares = [todo[start : start + AT_ONCE * world_size()] for start in range(0, len(todo), AT_ONCE * world_size())]
    if not todo:
        logger.info("%s passed these checks in an earlier run.", counted(len(items), "scan"))
        return [None] * len(items)

    def check(i: int) -> tuple[int, Any, str | None, list[str]]:
        stamp = _stamps(items[i])  # before reading: a file that changes while it is read is checked again next time
        doubts: list[str] = []
        return (
            i,
            stamp,
            _problem(
                items[i], channels, labels, ignore_label, read if voxels else None, doubts if hounsfield else None
            ),
            doubts,
        )

    problems: dict[int, str | None] = {}
    doubtful: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        # Results are exchanged after every share, so that no rank waits until a collective times out, and what passed
        # is recorded even if the run is stopped.
        for share in _with_progress(shares, len(todo)):
            for i, stamp, problem, doubts in gather_lists(list(pool.map(check, share[rank() :: world_size()]))):
                problems[i] = problem
                doubtful += doubts
                if stamp and not problem:
                    passed[keys[i]] = stamp
            if rank() == 0:
                _write_passed(remember, passed)

    if doubtful and rank() == 0:
        logger.warning(
            "%d of %s not look like CT in HU, which the network expects; the masks may be wrong:%s",
            *(
                len(doubtful),
                counted(len(items), "scan does", "scans do"),
                "".join(f"\n  {doubt}" for doubt in doubtful[:LISTED]),
            ),
        )
    return [problems.get(i) for i in range(len(items))]


def _with_progress(shares: list, count: int) -> Iterable:
    if rank() > 0:
        return shares
    if len(shares) > 1 and sys.stderr.isatty():
        return track(shares, f"checking {counted(count, 'scan')}", console=Console(stderr=True))
    logger.info("checking %s", counted(count, "scan"))
    return shares


# ---- one scan ------------------------------------------------------------------------------------------------------


def _files(item: dict) -> list[str]:
    images = [item["image"]] if isinstance(item["image"], (str, os.PathLike)) else list(item["image"])
    return [os.fspath(file) for file in images + ([item["label"]] if "label" in item else [])]


def _problem(
    item: dict,
    channels: int,
    labels: list[int] | None,
    ignore_label: int | None,
    read: ReadVoxels | None,
    doubts: list[str] | None,
) -> str | None:
    """Return "file: what is wrong" for the first fault of a scan, None for a good one.

    ``read`` reads the voxels; without it, only the headers are checked. Reasons why the values may not be HU are
    appended to ``doubts``.
    """
    files = _files(item)
    image_files = files[:-1] if "label" in item else files
    if len(image_files) > 1 and len(image_files) != channels:
        return (
            f"{image_files[0]}: this scan is a list of {len(image_files)} files, but {counted(channels, 'channel is', 'channels are')} "
            "expected; list one file per channel"
        )
    first = None
    for number, file in enumerate(files):
        try:
            scan = open_scan(file)
            if number < len(image_files):
                check_image_shape(scan.shape, channels if len(image_files) == 1 else 1)
                if first is not None:
                    _check_grid(scan, first, f"first channel {image_files[0]}")
                if read:
                    raw, slope, inter = read(scan, file)
                    low, high = check_finite(raw, slope, inter)
                    if doubts is not None and (doubt := _doubt(raw, slope, inter, low, high)):
                        doubts.append(f"{file}: {doubt}")
                first = first or scan
            else:
                _check_label_shape(scan.shape)
                _check_grid(scan, first, f"image {image_files[0]}", may_be_turned=True)
                if read:
                    _check_label_values(*read(scan, file), labels, ignore_label)
        except RefusedScan as error:
            return f"{file}: {error}"
        except Exception as error:  # nibabel, gzip, zlib and numpy raise many kinds of errors for broken files
            return f"{file}: cannot be read, perhaps damaged or cut short ({type(error).__name__}: {error})"
    return None


def _check_label_shape(shape: tuple[int, ...]) -> None:
    if len(_without_trailing_ones(shape)) != 3:
        raise RefusedScan(
            f"is a label of shape {shape}; it must be one 3D volume of label values (no one-hot channels)"
        )


def _check_grid(
    scan: nib.spatialimages.SpatialImage,
    other: nib.spatialimages.SpatialImage,
    name: str,
    *,
    may_be_turned: bool = False,
) -> None:
    """Raise `RefusedScan` unless both have the same grid; with ``may_be_turned``, the same after both turn to RAS."""
    (shape, affine), (expected, wanted) = ((each.shape[:3], each.affine) for each in (scan, other))
    if may_be_turned:
        (shape, affine), (expected, wanted) = in_ras(shape, affine), in_ras(expected, wanted)
    if shape != expected:
        raise RefusedScan(
            f"has shape {scan.shape[:3]}, but its {name} has {other.shape[:3]}; both must have the same grid"
        )
    if not is_aligned(affine, wanted, shape):
        shift = corner_shift(affine, wanted, shape)
        raise RefusedScan(
            f"is not aligned with its {name}: the affines differ by up to {shift.max():.3g} voxels (origin "
            f"{_numbers(scan.affine[:3, 3])} versus {_numbers(other.affine[:3, 3])}, spacing "
            f"{_numbers(nib.affines.voxel_sizes(scan.affine))} versus "
            f"{_numbers(nib.affines.voxel_sizes(other.affine))}); resample it to that grid. Copy the header of the other "
            "only if you know that the voxels of both are in the same order"
        )


def _doubt(raw: np.ndarray, slope: float, inter: float, low: float, high: float) -> str | None:
    """Return why the values do not look like HU, or None; percentiles of `SAMPLE` voxels spread over the scan."""
    sample = raw.ravel(order="K")[:: max(1, raw.size // SAMPLE)]
    p95, p99_5 = np.quantile(sample, [0.95, 0.995], method="inverted_cdf") * slope + inter
    return doubt_of_hounsfield(low, high, p95=float(p95), p99_5=float(p99_5))


def _numbers(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _check_label_values(
    raw: np.ndarray, slope: float, inter: float, labels: list[int] | None, ignore_label: int | None
) -> None:
    wrong = set()
    for plane in np.moveaxis(raw, 2, 0):  # a plane has few values: sorting each is faster than sorting all
        values = whole_labels(np.unique(plane).astype(float) * slope + inter).tolist()
        if labels is None:
            wrong.update(value for value in values if not (value >= 0 and value.is_integer()))
        else:
            wrong.update(value for value in values if value not in labels and value != ignore_label)
        if len(wrong) > 10:
            break
    if wrong:
        shown = ", ".join(f"{value:g}" for value in sorted(wrong)[:10]) + (" ..." if len(wrong) > 10 else "")
        allowed = "whole numbers from 0" if labels is None else allowed_values(labels, ignore_label)
        hint = f"; for unknown voxels, pass --ignore_label {IGNORE_LABEL}" if wrong == {IGNORE_LABEL} else ""
        raise RefusedScan(f"holds the label value{'s' * (len(wrong) > 1)} {shown}; allowed are {allowed}{hint}")


# ---- record of passed scans ----------------------------------------------------------------------------------------


def _key(item: dict, channels: int, labels: list[int] | None, voxels: bool) -> str:
    return json.dumps([[os.path.abspath(file) for file in _files(item)], "label" in item, channels, labels, voxels])


def _stamps(item: dict) -> list[list[int]] | None:
    try:
        return [file_stamp(file) for file in _files(item)]
    except OSError:
        return None


def _read_passed(remember: str | os.PathLike | None) -> dict:
    try:
        passed = json.loads(Path(remember).read_text(encoding="utf-8"))["passed_scan_checks"] if remember else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # missing, damaged, or another file: check everything
    return passed if isinstance(passed, dict) else {}


def _write_passed(remember: str | os.PathLike | None, passed: dict) -> None:
    if not remember:
        return
    try:
        write_text(remember, json.dumps({"passed_scan_checks": passed}))
    except OSError as error:  # a read-only folder costs time in the next run, but is not a reason to stop
        logger.warning("Cannot record the checked scans in %s, so the next run checks them again: %s", remember, error)
