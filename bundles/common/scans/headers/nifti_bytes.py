# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read the header of a NIfTI file as stored, and refuse a file that cannot hold what its header claims.

Everything is decided from the first bytes and the size of the file: a file that claims terabytes, or unpacks to them,
is refused before any memory is asked for it. nibabel then reads exactly as many bytes as the header needs.
"""

from __future__ import annotations

import gzip
import math
import os
from typing import BinaryIO

import numpy as np
from nibabel import Nifti1Header, Nifti2Header

from ...errors import RefusedScan
from .plausible import check_voxel_count

DEFLATE_RATIO = 1100  # gzip compresses at most 1032 bytes into one
MAX_OFFSET = 2**26  # bytes before the voxels: headers of other programs, a few megabytes at most
MAX_EXTENSIONS = 1000  # other programs write a few
HEADERS = {348: Nifti1Header, 540: Nifti2Header}  # by their size, which is their first number
GZIP = b"\x1f\x8b"
COMPRESSIONS = {GZIP: "gzip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstandard", b"\xfd7zXZ\0": "xz", b"PK\3\4": "zip"}


def stored_header(file: str | os.PathLike) -> Nifti1Header:
    """Read the header without the repairs that nibabel makes, such as a spacing of 0 that becomes 1.

    Args:
        file: a file named ``.nii`` or ``.nii.gz``, in any case.

    Raises:
        RefusedScan: it is not a NIfTI file, is compressed in another way than its name says, has voxels that are not
            plain numbers, or cannot hold the voxels that its header claims.
    """
    name = os.fspath(file).lower()
    packed = name.endswith(".nii.gz")
    if not packed and not name.endswith(".nii"):
        raise RefusedScan("is not named like a NIfTI file (.nii, .nii.gz): convert or decompress it to one")
    with open(file, "rb") as plain:
        start = plain.read(8)
        _check_compression(start, packed)
        plain.seek(0)
        with gzip.GzipFile(fileobj=plain) if packed else plain as stream:
            first = stream.read(4)
            size = _header_size(first)
            if size is None:
                raise RefusedScan(f"cannot be read: it is no NIfTI file, its header begins with {first!r}")
            header = HEADERS[size](first + stream.read(size - 4), check=False)
            offset = _check_offset(header, stream, size)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iufb":
        raise RefusedScan(f"has voxels of type {dtype}; they must be plain numbers")
    shape = header.get_data_shape()
    check_voxel_count(shape)
    need, have = offset + math.prod(int(size) for size in shape) * dtype.itemsize, os.path.getsize(file)
    if need > have * (DEFLATE_RATIO if packed else 1):
        raise RefusedScan(
            f"cannot be read, perhaps damaged or cut short: its shape {tuple(shape)} requires {need} bytes, and the file "
            f"has {have}{', compressed' if packed else ''}"
        )
    return header


def _header_size(first: bytes) -> int | None:
    """Return the size of the header from its first four bytes; None if they are not those of NIfTI."""
    sizes = [int.from_bytes(first, order) for order in ("little", "big")]
    return next((size for size in sizes if size in HEADERS), None)


def compression(start: bytes) -> str:
    """Return the program that a file is compressed by, from its first bytes; "" if it is unknown."""
    return next((kind for magic, kind in COMPRESSIONS.items() if start.startswith(magic)), "")


def _check_compression(start: bytes, packed: bool) -> None:
    if packed and _header_size(start[:4]):
        raise RefusedScan("is not compressed though named .nii.gz: rename it to .nii")
    if packed and start.startswith(GZIP):
        return
    named = ".nii.gz" if packed else ".nii"
    if kind := compression(start):
        advice = "rename it to .nii.gz" if kind == "gzip" else "decompress it, and compress it with gzip"
        raise RefusedScan(f"is {kind}-compressed though named {named}: {advice}")
    if packed:
        raise RefusedScan(f"cannot be read: it is no NIfTI file compressed with gzip, but begins with {start!r}")


def _check_offset(header: Nifti1Header, stream: BinaryIO, size: int) -> int:
    """Check where the voxels begin, and the lengths of what other programs have put before them; return the former."""
    offset = float(header["vox_offset"])
    if not (np.isfinite(offset) and 0 <= offset <= MAX_OFFSET):
        raise RefusedScan(f"has a damaged header: its voxels begin at byte {offset:g}")
    position = size + 4
    if stream.read(4)[:1] in (b"", b"\0"):
        return max(int(offset), position)
    for number in range(MAX_EXTENSIONS + 1):
        if position + 16 > offset:
            break
        if number == MAX_EXTENSIONS:
            raise RefusedScan(f"has a damaged header: more than {MAX_EXTENSIONS} extensions")
        length = int(np.frombuffer(stream.read(8).ljust(8, b"\0"), f"{header.endianness}i4")[0])
        if not 8 <= length <= offset - position:
            raise RefusedScan(
                f"has a damaged header: an extension of {length} bytes at byte {position}, and voxels from {offset:.0f}"
            )
        stream.seek(length - 8, os.SEEK_CUR)
        position += length
    return int(offset)
