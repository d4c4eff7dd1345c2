# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read DICOM headers, each once in a run: grouping, reading and writing a segmentation need the same ones."""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
from pydicom.charset import python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, STANDARD_VR

from ..errors import RefusedScan
from ..files import file_stamp
from .dicom.size import (
    ITEM,
    LARGEST_HEADER,
    check_items,
    header_limit,
    inflate,
    item_limit,
    pixel_bytes,
    transfer_syntax,
)

logger = logging.getLogger(__name__)

THREADS = 8  # for headers: over a network, one after the other takes minutes for a few thousand files
KEPT_HEADERS = 2000  # headers of CT slices, about 45 KB each
# A file without the preamble starts with an element of group 2 or 8.
_BARE_STARTS = (b"\x02\x00", b"\x08\x00")
# One of these makes a file without the preamble DICOM: by chance, other files start like one.
_KEYWORDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality")
LONGEST_UID = 64  # characters
HEAD = 4096  # bytes that hold the meta information of any usual file
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)

# pydicom warns and logs an unknown character set at each text of each file; `_warn_of_character_set` says it once.
UNKNOWN_CHARACTER_SET = "Unknown encoding"
warnings.filterwarnings("ignore", message=UNKNOWN_CHARACTER_SET, module=r"pydicom\.")
_told: set[str] = set()  # messages of pydicom: it repeats them for each slice


def _is_new(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    with _lock:
        new = message not in _told and not message.startswith(UNKNOWN_CHARACTER_SET)
        _told.add(message)
    return new


_kept: OrderedDict[str, tuple[list[int], Dataset]] = OrderedDict()  # by file; the last one was used last
_character_sets: set[str] = set()  # character sets that were looked at
_lock = threading.Lock()
logging.getLogger("pydicom").addFilter(_is_new)


def is_dicom(path: str | os.PathLike) -> bool:
    """Return whether a file is DICOM by its content, with or without the preamble. False if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            if stream.read(132)[128:] == b"DICM":
                return True
            stream.seek(0)
            start = stream.read(HEAD)
        tags = _bare_tags(start)
        if tags and _may_be_deflated(start) and DeflatedExplicitVRLittleEndian.encode() in start:
            header = read_header(path, convert=_KEYWORDS)
            return any(keyword in header for keyword in _KEYWORDS)
        return any(tag_for_keyword(keyword) in tags for keyword in _KEYWORDS)
    except (OSError, RefusedScan):
        return False


def read_header(file: str | os.PathLike, *, convert: Sequence[str] = ()) -> Dataset:
    """Read a DICOM header, with or without the preamble: all elements before the pixels.

    The last `KEPT_HEADERS` headers stay in memory; an unchanged file is not read again.

    Args:
        file: the file.
        convert: keywords of elements whose values must be valid. Others may have values that pydicom cannot convert.

    Returns:
        The header. All callers share it: add what is missing, but change no value.

    Raises:
        RefusedScan: the file cannot be opened or is not a DICOM file.
    """
    try:
        header = _read(os.path.abspath(file))
        for keyword in convert:
            header.get(keyword)  # converts the value, which can fail
        return header
    except (RefusedScan, MemoryError):
        raise
    except OSError as error:
        raise RefusedScan(f"it cannot be opened ({error.strerror or error})") from error
    except Exception as error:  # pydicom raises different errors depending on where a file is broken
        raise RefusedScan(f"it cannot be read as DICOM: truncated or damaged ({first_line(error)})") from error


def read_headers(files: Iterable[str]) -> dict[str, Dataset]:
    """Read the header of each file, without the pixels; see `read_header`. Files named twice are read once.

    Raises:
        RefusedScan: a file cannot be read; the message names it.
    """

    def header(file: str) -> Dataset:
        try:
            return read_header(file)
        except RefusedScan as reason:
            raise RefusedScan(f"{Path(file).name}: {reason}") from reason

    names = list(dict.fromkeys(files))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(header, names), strict=True))


def valid_uid(text: str) -> str:
    """Return a UID: digits with dots, 64 characters at most; "" for other texts, which name nothing."""
    return text if re.fullmatch(r"[0-9]+(\.[0-9]+)+", text) and len(text) <= LONGEST_UID else ""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0].rstrip(".:") or type(error).__name__


def _read(file: str) -> Dataset:
    stamp = file_stamp(file)
    with _lock:
        if file in _kept and _kept[file][0] == stamp:
            _kept.move_to_end(file)
            return _kept[file][1]
    with open(file, "rb") as stream:
        start = stream.read(HEAD)
    if not start:
        raise RefusedScan("it is empty (0 bytes)")
    bare = start[128:132] != b"DICM"
    if bare and not _bare_tags(start):
        raise RefusedScan("it is not a DICOM file")
    header = _deflated(file, bare) if _may_be_deflated(start) else None
    if header is None:
        check_items(file)
    header = header or pydicom.dcmread(file, stop_before_pixels=True, force=bare)
    _warn_of_character_set(str(header.get("SpecificCharacterSet") or ""), file)
    with _lock:
        _kept[file] = (stamp, header)
        while len(_kept) > KEPT_HEADERS:
            _kept.popitem(last=False)
    return header


def _warn_of_character_set(value: str, file: str) -> None:
    """Warn once per run, for each character set that pydicom does not know, that texts may be wrong."""
    with _lock:
        if value in _character_sets:
            return
        _character_sets.add(value)
    names = re.findall(r"[^\[\]', ][^\[\]',]*", value)
    if any(name not in python_encoding for name in names):
        logger.warning(
            "%s has the unknown SpecificCharacterSet %s: names of patients may be read wrong, here and in other files.",
            *(file, value),
        )


def _bare_tags(start: bytes) -> list[int]:
    """Return the tags of the elements in the first bytes of a file without the preamble; none if they are not DICOM.

    The first is of group 2 or 8, the tags grow, and each value but the last ends within these bytes.
    """
    tags: list[int] = []
    at = 0
    if start[:2] not in _BARE_STARTS:
        return tags
    while at + 8 <= len(start):
        tag = int.from_bytes(start[at : at + 2], "little") << 16 | int.from_bytes(start[at + 2 : at + 4], "little")
        if tags and tag <= tags[-1]:
            # After the meta information, a deflated data set looks like anything.
            deflated = tags[-1] >> 16 == 2 and DeflatedExplicitVRLittleEndian.encode() in start
            return tags if deflated else []
        vr = start[at + 4 : at + 6].decode("latin-1")
        if vr not in STANDARD_VR:  # implicit
            size, value = int.from_bytes(start[at + 4 : at + 8], "little"), at + 8
        elif vr in EXPLICIT_VR_LENGTH_32:
            size, value = int.from_bytes(start[at + 8 : at + 12], "little"), at + 12
        else:
            size, value = int.from_bytes(start[at + 6 : at + 8], "little"), at + 8
        tags.append(tag)
        at = value + size  # far beyond the start if the size is undefined, as of a sequence
    return tags if len(tags) > 1 else []


def read_image(file: str, header: Dataset) -> Dataset:
    """Read a file with its pixels, decompressed only if the whole file is (deflate).

    Args:
        file: the file.
        header: its header, which says how many pixels to expect.

    Raises:
        RefusedScan: it unpacks to more than its header claims.
        Exception: it is damaged; pydicom raises several kinds.
    """
    limit = LARGEST_HEADER + pixel_bytes(header, Path(file).name)
    deflated = transfer_syntax(header) == DeflatedExplicitVRLittleEndian
    return deflated and _deflated(file, True, limit) or pydicom.dcmread(file, force=True)


def _may_be_deflated(start: bytes) -> bool:
    """Return whether, by its first bytes, a file's meta information may name deflate; few files are then read twice."""
    sized = start[132:140] == b"\x02\x00\x00\x00UL\x04\x00" and int.from_bytes(start[140:144], "little") < HEAD - 144
    return not sized or DeflatedExplicitVRLittleEndian.encode() in start


def _deflated(file: str, bare: bool, limit: int | None = None) -> FileDataset | None:
    """Return a data set that is deflated as a whole, without the pixels if ``limit`` is None; None if it is not.

    pydicom inflates such a file without a limit: 1 MB can become 1 GB.
    """
    with open(file, "rb") as stream:
        preamble = read_preamble(stream, bare)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag.group != 2)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return None
        allowed = limit or header_limit(os.path.getsize(file))
        content, complete = inflate(stream, allowed)
    if not limit:  # with pixels, its header was read before
        items, most = content.count(ITEM), item_limit(os.path.getsize(file))
        if items > most:
            raise RefusedScan(f"its header unpacks to {items:,} items, more than {most:,}: exclude it")
    if limit and not complete:
        raise RefusedScan(f"it unpacks to more than the {allowed:,} bytes that its header allows: exclude it")
    reached = []

    def at_pixels(tag: int, *_: object) -> bool:
        if tag in _PIXELS:
            reached.append(tag)
        return bool(reached) and limit is None

    dataset = read_dataset(io.BytesIO(content), False, True, stop_when=at_pixels)
    if not complete and not reached:
        raise RefusedScan(f"its header unpacks to more than {allowed:,} bytes: exclude it")
    return FileDataset(file, dataset, preamble, FileMetaDataset(meta), is_implicit_VR=False, is_little_endian=True)
