# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read MetaImage files (.mhd with .raw or .zraw, .mha), the format of LUNA16."""

from __future__ import annotations

import os
import re
import zlib

import numpy as np

from ..errors import RefusedScan
from .headers.plausible import check_plausible

SUFFIXES = (".mhd", ".mha")
# Other names of these fields; MetaIO, the reader of ITK, accepts all of them.
SYNONYMS = {
    "Offset": ("Position", "Origin"),
    "TransformMatrix": ("Rotation", "Orientation"),
    "ElementSpacing": ("ElementSize",),
}
# What these fields must be, if present: MetaIO knows more, but ITK ignores it, or reads other values.
ONLY = {
    "BinaryData": ("true",),
    "DistanceUnits": ("mm", "?", ""),
    "ElementToIntensityFunctionSlope": ("1",),
    "ElementToIntensityFunctionOffset": ("0", "-0"),
}
TO_THE_END = -1  # the HeaderSize of a data file whose last bytes are the voxels
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS  # zlib tells them apart
HEADER_END = b"ElementDataFile"  # the last key of the header; in .mha the voxels follow on the next line
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def data_file(path: str | os.PathLike) -> str:
    """Return the file that holds the voxels: the file of the header itself, or the one that it names.

    Raises:
        RefusedScan: the header cannot be read, or names a file outside of its folder.
    """
    name = _header(path)[0]["ElementDataFile"]
    if name == "LOCAL":
        return os.fspath(path)
    if re.match(r"LIST\b", name) or "%" in name:
        raise RefusedScan(
            f"has its voxels in several files (ElementDataFile = {name}): convert it to one, e.g. with 3D Slicer or SimpleITK"
        )
    if not name or os.path.isabs(name) or re.match("[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise RefusedScan(
            f"names {name!r} as its data file, which is not in the folder of the header: put the file there, and write its "
            "name alone (ElementDataFile)"
        )
    return os.path.join(os.path.dirname(path), name)


def read_meta_image(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read a three-dimensional image.

    Returns:
        The stored voxels (X, Y, Z), and the affine (4, 4), voxel indices to mm in RAS. (The files of ITK use LPS.)

    Raises:
        RefusedScan: the file is damaged, truncated, or of a kind that is not supported.
    """
    fields, start = _header(path)
    if fields.get("NDims") != "3":
        raise RefusedScan(f"has {fields.get('NDims', 'no')} dimensions (NDims), not 3")
    channels = fields.get("ElementNumberOfChannels", "1")
    if channels != "1" or fields.get("ElementType") not in TYPES:
        raise RefusedScan(
            f"has {channels} channel{'s' * (channels != '1')} of type {fields.get('ElementType')}; it must "
            f"have one channel of type {', '.join(TYPES)}"
        )
    for name, allowed in ONLY.items():
        value = fields.get(name, allowed[0])
        if _plain(value) not in allowed:
            raise RefusedScan(
                f"has {name} = {value}, which programs read in different ways: convert it, with {allowed[0]}"
            )
    shape = _numbers(fields, "DimSize", 3).astype(int)
    spacing = _numbers(fields, "ElementSpacing", 3)
    if not (shape > 0).all() or not (spacing > 0).all():
        raise RefusedScan(f"has shape {shape.tolist()} and spacing {spacing.tolist()} mm; all must be above 0")
    big = _true(fields, "BinaryDataByteOrderMSB") or _true(fields, "ElementByteOrderMSB")
    dtype = np.dtype((">" if big else "<") + TYPES[fields["ElementType"]])
    affine = np.eye(4)
    # The rows of TransformMatrix are the directions of the axes.
    affine[:3, :3] = _numbers(fields, "TransformMatrix", 9, default=np.eye(3).ravel()).reshape(3, 3).T * spacing
    affine[:3, 3] = _numbers(fields, "Offset", 3, default=np.zeros(3))
    if abs(np.linalg.det(affine[:3, :3])) <= 1e-3 * spacing.prod():
        raise RefusedScan(f"has TransformMatrix = {fields['TransformMatrix']}, whose axes are zero or lie in one plane")
    check_plausible(shape.tolist(), affine)
    expected = int(np.prod(shape)) * dtype.itemsize
    data = _read_data(path, fields, start, expected)
    voxels = np.frombuffer(data, dtype).reshape(shape, order="F").astype(dtype.newbyteorder("="), copy=False)
    return voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _read_data(path: str | os.PathLike, fields: dict[str, str], start: int, expected: int) -> bytes:
    """Read ``expected`` bytes of voxels. Neither a large file nor one that unpacks to more is read as a whole."""
    file = data_file(path)
    start = start if fields["ElementDataFile"] == "LOCAL" else 0
    if not os.path.lexists(file):
        raise RefusedScan(f"names {file} as its data file, which does not exist: put it there")
    if os.path.lexists(file) and not os.path.isfile(file):  # opening a pipe would wait forever
        raise RefusedScan(f"names {file} as its data file, which is no regular file")
    with open(file, "rb") as stream:
        have = os.path.getsize(file) - start
        packed = _true(fields, "CompressedData")
        skipped = _skipped(fields)
        if skipped == TO_THE_END and not packed:
            skipped = max(have - expected, 0)
        start, have = start + max(skipped, 0), have - max(skipped, 0)
        if have < 0:
            raise RefusedScan(
                f"is cut short, or has a damaged header: its voxels begin behind its end (HeaderSize {skipped})"
            )
        if have > expected + (expected // 100 + 1024 if packed else 0):
            raise _other_size(have, expected)
        stream.seek(start)
        data = stream.read(have)
    if packed:
        data = zlib.decompressobj(GZIP_OR_ZLIB).decompress(data, expected + 1)
    if len(data) != expected:
        raise _other_size(len(data), expected)
    return data


def _skipped(fields: dict[str, str]) -> int:
    """Return how many bytes of the data file come before the voxels; `TO_THE_END`: all but the voxels."""
    try:
        skipped = int(fields.get("HeaderSize") or 0)
    except ValueError:
        skipped = -2
    if skipped < TO_THE_END:
        raise RefusedScan(
            f"has HeaderSize = {fields['HeaderSize']}, which is not a number of bytes, or -1 for all before the voxels"
        )
    return skipped


def _plain(value: str) -> str:
    """Return a number in its shortest form, and other words in small letters."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value.lower()


def _other_size(have: int, expected: int) -> RefusedScan:
    return RefusedScan(
        f"is cut short, or has a damaged header: it has {have} bytes of voxels, but its header requires {expected}"
    )


def _header(path: str | os.PathLike) -> tuple[dict[str, str], int]:
    """Return the fields of the header and the position of its end."""
    with open(path, "rb") as file:
        start = file.read(65536)
    key = start.find(HEADER_END)
    end = start.find(b"\n", key) + 1
    if key < 0 or (end == 0 and len(start) == 65536):
        raise RefusedScan("is not a MetaImage: it has no ElementDataFile")
    lines = start[: end or None].decode(errors="replace").splitlines()
    fields = {name.strip(): value.strip() for name, found, value in (line.partition("=") for line in lines) if found}
    for name, others in SYNONYMS.items():
        for other in others:
            if other in fields:
                fields.setdefault(name, fields[other])
    return fields, end


def _true(fields: dict[str, str], name: str) -> bool:
    return fields.get(name, "False").lower() == "true"


def _numbers(fields: dict[str, str], name: str, count: int, *, default: np.ndarray | None = None) -> np.ndarray:
    if name not in fields and default is not None:
        return default
    try:
        numbers = np.array(fields.get(name, "").split(), dtype=float)
    except ValueError:
        numbers = np.array([])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise RefusedScan(f"has {name} = {fields.get(name, '(missing)')}, which is not {count} numbers")
    return numbers
