# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse DICOM images that claim more than their file can hold, before anything is unpacked or allocated."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from ...errors import RefusedScan

LARGEST_SIDE = 8192  # pixels; CT images have 512 to 2048
# No CT volume is compressed by more. Deflate reaches 1032 at most, other methods more only for images of one value.
LARGEST_RATIO = 1032
LARGEST_HEADER = 16 * 2**20  # bytes of a deflated header; Enhanced CT needs about 1 MB
HEADER_RATIO = 100  # ratio of a deflated header to its file; text is compressed by 10
SMALLEST_LIMIT = 2**20  # bytes that a deflated header may have in any case
LARGEST_FRAMES = 10_000  # frames of one image; the longest CT scans have about 5000 slices
# Items of sequences, which take pydicom 0.3 ms and 10 KB each: a frame of an Enhanced CT has about 15.
ITEMS_PER_FRAME = 100
FEWEST_ITEMS = 1000  # items that any header may have
BYTES_PER_ITEM = 8  # bytes of a deflated file per item; a frame has pixels as well
LARGEST_ITEMS = 300_000  # items of a header; an Enhanced CT of `LARGEST_FRAMES` has half of that
ITEMS_OF_ANY_FILE = 10_000  # items that any file may have; they take half a second
STORED_BYTES_PER_ITEM = 32  # bytes of a file per item; an item that says something has three times as many
ITEM, BIG_ENDIAN_ITEM = b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"  # the tag of an item
PIXELS, BIG_ENDIAN_PIXELS = b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"  # the tag of the pixels
CHUNK = 2**16  # bytes that are inflated at a time


def whole_number(header: Dataset, keyword: str, name: str, *, missing: int) -> int:
    """Return an element as a number, or ``missing`` if it is absent or empty.

    Raises:
        RefusedScan: it is not a whole number from 0.
    """
    try:
        value = header.get(keyword)
        number = int(missing if value in (None, "", b"") else value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0:
        stored = header.get_item(keyword).value
        raise RefusedScan(f"{name} has {keyword} {stored!r}, which is not a whole number from 0: export it again")
    return number


def frame_count(header: Dataset, name: str) -> int:
    """Return how many frames an image has, each with a place of its own.

    Raises:
        RefusedScan: they are more than `LARGEST_FRAMES`, or the header describes fewer frames than it counts, or so many
            that they are not worth reading.
    """
    frames = whole_number(header, "NumberOfFrames", name, missing=1) or 1
    if frames > LARGEST_FRAMES:
        raise RefusedScan(f"{name} has NumberOfFrames {frames}, more than the {LARGEST_FRAMES:,} of any CT: exclude it")
    stored = header.get_item("PerFrameFunctionalGroupsSequence")
    if stored is not None and isinstance(stored.value, bytes):  # not yet converted, which takes time
        items, allowed = stored.value.count(ITEM), FEWEST_ITEMS + ITEMS_PER_FRAME * frames
        if items > allowed:
            raise RefusedScan(
                f"{name} has NumberOfFrames {frames}, but {items:,} items that describe frames, more than the "
                f"{allowed:,} that these can need: exclude it"
            )
    described = len(header.get("PerFrameFunctionalGroupsSequence") or ())
    if frames > max(described, 1):
        raise RefusedScan(
            f"{name} has NumberOfFrames {frames}, but describes the place of {described} frames: export it again as "
            "single images, or as an Enhanced CT image"
        )
    return frames


def check_size(file: str, header: Dataset) -> None:
    """Refuse an image whose header claims more pixels than its file can hold.

    Raises:
        RefusedScan: the message says what is claimed, and how large the file is.
    """
    name = Path(file).name
    columns, rows = (whole_number(header, keyword, name, missing=0) for keyword in ("Columns", "Rows"))
    frames = whole_number(header, "NumberOfFrames", name, missing=1) or 1
    size = os.path.getsize(file)
    syntax = transfer_syntax(header)
    compressed = syntax == DeflatedExplicitVRLittleEndian or syntax.is_encapsulated
    claimed = pixel_bytes(header, name)
    if claimed > size * (LARGEST_RATIO if compressed else 1):
        raise RefusedScan(
            f"{name} is truncated, or has a damaged header: {frames} frames of {columns} x {rows} pixels need "
            f"{claimed:,} bytes, and the file has {size:,}{' (compressed)' if compressed else ''}. Copy the file again"
        )
    if max(columns, rows) > LARGEST_SIDE:
        raise RefusedScan(
            f"{name} has {columns} x {rows} pixels, more than the {LARGEST_SIDE} a side of any CT: exclude it"
        )
    frame_count(header, name)


def check_bits(file: str, header: Dataset) -> None:
    """Refuse an image whose header does not say how its stored values lie in their bits.

    Decoders take the lowest bits, whatever HighBit says: the values would be wrong.

    Raises:
        RefusedScan: the message names the element.
    """
    name = Path(file).name
    for keyword in ("BitsAllocated", "BitsStored", "PixelRepresentation"):
        if header.get(keyword) in (None, "", b""):
            raise RefusedScan(f"{name} has no {keyword}, so that its values cannot be known: export it again")
    stored = whole_number(header, "BitsStored", name, missing=0)
    high = whole_number(header, "HighBit", name, missing=stored - 1)
    if high != stored - 1 and not transfer_syntax(header).is_encapsulated:
        raise RefusedScan(
            f"{name} has HighBit {high} with BitsStored {stored}, not {stored - 1}: programs differ in which bits they take "
            "for the value. Convert it with its scanner's software, or export it again"
        )


def pixel_bytes(header: Dataset, name: str) -> int:
    """Return the size of all pixels that a header claims, in bytes."""
    keywords = {"Columns": 0, "Rows": 0, "NumberOfFrames": 1, "SamplesPerPixel": 1, "BitsAllocated": 8}
    claimed = 1
    for keyword, missing in keywords.items():
        claimed *= whole_number(header, keyword, name, missing=missing) or missing
    return (claimed + 7) // 8


def transfer_syntax(header: Dataset):
    """Return the transfer syntax. A file without the preamble does not record it, and uses the default one."""
    return header.file_meta.get("TransferSyntaxUID") or ImplicitVRLittleEndian


def check_fragments(dataset: Dataset, name: str) -> None:
    """Refuse compressed pixels that hold fewer frames, or larger ones, than the header says.

    Decoders allocate what the compressed image claims, whatever the header says.

    Raises:
        RefusedScan: the message gives both sizes.
    """
    stream = io.BytesIO(dataset.PixelData)
    parse_basic_offsets(stream)  # comes first, as an item of its own
    fragments = list(generate_fragments(stream))
    frames = whole_number(dataset, "NumberOfFrames", name, missing=1) or 1
    if frames > len(fragments):
        raise RefusedScan(f"{name} has NumberOfFrames {frames}, but {len(fragments)} compressed frames: copy it again")
    header = tuple(
        whole_number(dataset, keyword, name, missing=1) for keyword in ("Columns", "Rows", "SamplesPerPixel")
    )
    for fragment in fragments:
        size = _size_in_stream(fragment)
        if size and any(one > allowed for one, allowed in zip(size, header, strict=True)):
            raise RefusedScan(
                f"{name} has compressed pixels of {' x '.join(map(str, size))} (columns, rows, samples), but "
                f"its header says {' x '.join(map(str, header))}: exclude it"
            )


def _size_in_stream(stream: bytes) -> tuple[int, int, int] | None:
    """Return columns, rows and samples of a JPEG, JPEG-LS or JPEG 2000 image; None if it is another kind."""
    if stream.startswith(b"\xff\x4f\xff\x51"):  # SOC, SIZ: ISO/IEC 15444-1, A.5.1
        right, low, left, top = (int.from_bytes(stream[at : at + 4]) for at in (8, 12, 16, 20))
        return right - left, low - top, int.from_bytes(stream[40:42])
    if not stream.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 < len(stream) and stream[at] == 0xFF:  # ISO/IEC 10918-1, B.1 and B.2; 14495-1, C.1
        marker = stream[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = (int.from_bytes(stream[at + shift : at + shift + 2]) for shift in (5, 7))
            return columns, rows, stream[at + 9]
        at += 2 + int.from_bytes(stream[at + 2 : at + 4])
    return None


def header_limit(size: int) -> int:
    """Return the most bytes that the header in a deflated file may be inflated to; ``size``: bytes of the file."""
    return min(LARGEST_HEADER, SMALLEST_LIMIT + HEADER_RATIO * size)


def item_limit(size: int) -> int:
    """Return how many items of sequences the header in a deflated file may have; ``size``: bytes of the file."""
    return FEWEST_ITEMS + size // BYTES_PER_ITEM


def check_items(file: str) -> None:
    """Refuse a file whose header has more items than its size explains, before pydicom makes an object of each.

    Only the bytes before the pixels are read.

    Raises:
        RefusedScan: the message gives both numbers.
    """
    items, allowed = 0, min(LARGEST_ITEMS, ITEMS_OF_ANY_FILE + os.path.getsize(file) // STORED_BYTES_PER_ITEM)
    with open(file, "rb") as stream:
        while data := stream.read(CHUNK):
            items += data.count(ITEM) + data.count(BIG_ENDIAN_ITEM)
            if items > allowed:
                raise RefusedScan(
                    f"its header has more than the {allowed:,} items that a file of its size can need: exclude it"
                )
            if PIXELS in data or BIG_ENDIAN_PIXELS in data:
                return


def inflate(stream: BinaryIO, limit: int) -> tuple[bytes, bool]:
    """Inflate a raw deflate stream up to a limit in bytes. Return the start of the data, and whether that is all."""
    engine, parts, size = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
    while size < limit and not engine.eof:
        data = stream.read(CHUNK)
        if not data:
            break
        parts.append(engine.decompress(data, limit - size))
        size += len(parts[-1])
    ended = engine.eof or size < limit
    return b"".join(parts), ended
