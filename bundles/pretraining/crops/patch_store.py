# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Patch store: a scan as compressed blocks in one file. Reading a crop decompresses only the blocks that it touches.

A crop from a ``.nii.gz`` requires decoding the whole scan, or memory to keep it; from here, it takes milliseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import blosc2
import nibabel as nib
import numpy as np

from ...common.errors import InputError, RefusedScan
from ...common.files import atomic_path
from ...common.scans.int16_voxels import int16_or_float32

FORMAT = 1  # version of the file format; readers refuse any other
ENTRY = "scan"  # key of the metadata, a JSON text, because blosc2 metadata cannot hold objects

# Time and compression ratio per crop of 96^3, with one thread: on 512x512x200 int16 of smooth tissue and noise (S), and
# as the mean of two abdominal CT of 512x512x41 and x51, whose crops have the full depth (R). The ratio is the size of
# the voxels divided by that of the file. The choice is as fast as any with shuffle and has nearly the smallest files;
# bitshuffle saves a millisecond for 7% more disk space.
#   codec, filter, block             S: ratio, ms   R: ratio, ms
#   zstd 5, shuffle, 32x32x16           3.33, 2.6      2.87, 1.3   <- chosen; S is written in about a second
#   zstd 5, shuffle, 32^3               3.30, 2.6      2.83, 1.3
#   zstd 5, shuffle, 16^3               3.38, 3.4      2.86, 1.4
#   zstd 5, shuffle, 48^3               3.20, 3.0      2.81, 1.3
#   zstd 1, shuffle, 32x32x16           3.31, 2.8      2.80, 1.4
#   zstd 5, bitshuffle, 32x32x16        3.12, 1.5      2.68, 1.2
#   lz4hc 5, bitshuffle, 32^3           2.97, 1.3      2.31, 0.8 (R: only the first scan)
# The chunk size, from 32^3 to 256x256x64, changes neither.
BLOCK = (32, 32, 16)
CHUNK = (64, 64, 64)
COMPRESSION = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE]}
# Workers are already processes, and threads started by blosc2 do not survive the fork of a worker.
THREADS = {"nthreads": 1}


def _as_stored(voxels: np.ndarray) -> np.ndarray:
    """Convert voxels to int16 if that keeps every value, else to float32; C-contiguous.

    Raises:
        RefusedScan: a value is NaN or infinite.
    """
    stored = int16_or_float32(voxels, order="C")
    if stored.dtype != np.int16 and not np.isfinite(stored).all():
        raise RefusedScan("has voxels that are not numbers (NaN or infinite)")
    return stored


def write_scan(
    path: str | os.PathLike,
    *,
    voxels: np.ndarray,
    affine: np.ndarray,
    body_box: Sequence[Sequence[int]],
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write one scan atomically; parent folders are created.

    Args:
        path: the file, by convention ``.b2nd``.
        voxels: HU, (X, Y, Z) in RAS order. Stored as int16 if all values are whole numbers that fit, else as float32.
        affine: (4, 4), voxel indices to mm in RAS.
        body_box: ``[[low, high], ...]`` per axis, half-open, in voxels: crops are drawn here.
        details: further information about the scan: numbers, text, lists, and dicts with text as keys.

    Raises:
        RefusedScan: a voxel is NaN or infinite.
        ValueError: shapes do not match, or the box is not inside the volume.
    """
    affine = np.asarray(affine, dtype=np.float64)
    box = [[int(low), int(high)] for low, high in body_box]
    if voxels.ndim != 3 or not voxels.size or affine.shape != (4, 4) or len(box) != 3:
        raise ValueError(
            f"expected voxels (X, Y, Z), affine (4, 4) and a box of 3 axes, got {voxels.shape}, {affine.shape}, {box}"
        )
    if not _is_inside(box, voxels.shape):
        raise ValueError(f"body_box {box} is not inside a volume of {voxels.shape} voxels")
    header = {"format": FORMAT, "affine": affine.tolist(), "body_box": box, "details": dict(details or {})}
    entry = json.dumps(header)
    blocks = [min(block, size) for block, size in zip(BLOCK, voxels.shape, strict=True)]
    whole_blocks = [-(-size // block) * block for block, size in zip(blocks, voxels.shape, strict=True)]
    with atomic_path(path) as temporary:
        array = blosc2.asarray(
            _as_stored(voxels),
            urlpath=str(temporary),
            mode="w",
            chunks=[
                min(chunk // block * block, whole)
                for chunk, block, whole in zip(CHUNK, blocks, whole_blocks, strict=True)
            ],
            blocks=blocks,
            cparams=blosc2.CParams(**COMPRESSION, **THREADS),
            dparams=blosc2.DParams(**THREADS),
        )
        array.schunk.vlmeta[ENTRY] = entry
        del array  # closes the file


def _is_inside(box: Sequence[Sequence[int]], shape: Sequence[int]) -> bool:
    """Return whether a box, half-open per axis, is inside a volume."""
    return len(box) == len(shape) == 3 and all(
        isinstance(low, int) and isinstance(high, int) and 0 <= low <= high <= size
        for (low, high), size in zip(box, shape, strict=True)
    )


class StoredScan:
    """A scan written by `write_scan`. Data are read on access, and no file stays open. Pickled as its path.

    Opening the file for every crop takes 0.1 to 0.2 ms, but thousands of scans need no file descriptors. The file is
    not memory-mapped: a crop would take 0.7 ms less if the file is in the page cache, but twice as long from disk (22
    instead of 12 ms), and a failing disk would kill the worker instead of raising an error.

    Args:
        path: the file.

    Raises:
        InputError: on any access, if the file is missing, truncated, damaged, or not a stored scan of this format.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)

    def __reduce__(self) -> tuple:
        return StoredScan, (self.path,)

    def _open(self) -> tuple[blosc2.NDArray, dict[str, Any]]:
        try:
            with open(self.path, "rb"):  # to get the reason, which blosc2 does not report
                pass
        except OSError as error:
            raise InputError(
                f"The stored scan {self.path} cannot be read ({error.strerror}): check the path, or run prepare again."
            ) from error
        try:
            array = blosc2.open(self.path, mode="r", dparams=blosc2.DParams(**THREADS))
            header = json.loads(array.schunk.vlmeta[ENTRY])
            written = header["format"]
            inside = written != FORMAT or _is_inside(header["body_box"], array.shape)
        # The errors of blosc2 and of the lines after it depend on what the file is.
        except Exception as error:
            raise InputError(
                f"{self.path} ({os.path.getsize(self.path)} bytes) is truncated, damaged or not a stored scan: "
                "delete it and run prepare again."
            ) from error
        if written != FORMAT:
            raise InputError(
                f"{self.path} is a stored scan of format {written}, but this code reads format {FORMAT}: "
                "run prepare again."
            )
        if not inside:
            raise InputError(
                f"{self.path} is damaged: its body box {str(header['body_box'])[:80]} is not inside its {array.shape} voxels. "
                "Delete it and run prepare again."
            )
        return array, header

    @cached_property
    def _header(self) -> dict[str, Any]:
        array, header = self._open()
        return {**header, "shape": tuple(array.shape), "dtype": array.dtype}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels per axis."""
        return self._header["shape"]

    @property
    def dtype(self) -> np.dtype:
        """int16 or float32."""
        return self._header["dtype"]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), voxel indices to mm in RAS."""
        return np.array(self._header["affine"])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel in mm."""
        return tuple(nib.affines.voxel_sizes(self.affine).tolist())

    @property
    def body_box(self) -> list[list[int]]:
        """``[[low, high], ...]`` per axis, half-open, in voxels."""
        return self._header["body_box"]

    @property
    def details(self) -> dict[str, Any]:
        """Further information that `write_scan` was given."""
        return self._header["details"]

    def read(self, slices: Sequence[slice]) -> np.ndarray:
        """Read the voxels of a box into a new array.

        Args:
            slices: one per axis, without a step.
        """
        array, _ = self._open()
        try:
            return array[tuple(slices)]
        except RuntimeError as error:
            raise InputError(f"{self.path} is damaged: delete it and run prepare again.") from error
