# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A header that claims more than its file can hold is refused at once, by both numbers."""

from __future__ import annotations

import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from bundles.common.errors import RefusedScan
from bundles.common.scans.dicom import size
from bundles.common.scans.dicom.size import inflate
from bundles.common.scans.dicom_headers import read_header, read_headers
from bundles.common.scans.dicom_series import find_series, read_series
from bundles.common.scans.slice_grid import sort_slices

from ..dicom_files import write_enhanced, write_series

MB = 2**20


def stored_values(shape=(7, 6, 4)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3000, size=shape)


def refusal(folder: Path) -> str:
    """The message, which must come without unpacking anything."""
    tracemalloc.start()
    try:
        (series,), _ = find_series(folder.iterdir())
        with pytest.raises(RefusedScan) as refused:
            read_series(series)
        assert tracemalloc.get_traced_memory()[1] < 100 * MB
    finally:
        tracemalloc.stop()
    return str(refused.value)


def edit(files, change) -> None:
    for file in files:
        dataset = pydicom.dcmread(file)
        change(dataset)
        dataset.save_as(file)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"NumberOfFrames": 2147483647}, "2147483647 frames of 7 x 6 pixels need 180,388,626,348 bytes, and the file"),
        ({"NumberOfFrames": 2}, "describes the place of 0 frames"),
        ({"NumberOfFrames": -1}, "NumberOfFrames '-1', which is not a whole number"),
        ({"Rows": 65535, "Columns": 65535}, "1 frames of 65535 x 65535 pixels need 8,589,672,450 bytes"),
        ({"Rows": 65535}, "65535 pixels need"),
        ({"SamplesPerPixel": 60000}, "pixels need 5,040,000 bytes"),
    ],
)
def test_an_absurd_size_is_refused_at_once(tmp_path, tags, words):
    write_series(tmp_path, stored_values(), **tags)
    message = refusal(tmp_path)
    assert words in message and ".dcm" in message


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian])
def test_an_absurd_size_of_compressed_pixels_is_refused_at_once(tmp_path, syntax):
    files = write_series(
        tmp_path, stored_values(), syntax=syntax if syntax != DeflatedExplicitVRLittleEndian else "1.2.840.10008.1.2.1"
    )

    def grow(dataset):
        dataset.Rows = dataset.Columns = 65535
        dataset.file_meta.TransferSyntaxUID = syntax

    edit(files, grow)
    assert "1 frames of 65535 x 65535 pixels need 8,589,672,450 bytes" in refusal(tmp_path)
    assert "(compressed)" in refusal(tmp_path)


def test_an_absurd_side_is_refused(tmp_path):
    """The file may be large enough, deflated."""

    def widen(dataset):
        dataset.Columns, dataset.Rows = 10000, 1

    edit(write_series(tmp_path, stored_values((100, 100, 4))), widen)
    assert "has 10000 x 1 pixels, more than the 8192 a side" in refusal(tmp_path)


def test_more_frames_than_are_described_are_refused(tmp_path):
    file = write_enhanced(tmp_path / "a.dcm", stored_values(), slope=[1] * 4, intercept=[0] * 4, order=range(4))
    edit([file], lambda dataset: setattr(dataset, "NumberOfFrames", 5))
    header = read_headers([str(file)])
    with pytest.raises(RefusedScan, match="NumberOfFrames 5, but describes the place of 4 frames"):
        sort_slices(header)


def test_fewer_compressed_frames_than_counted_are_refused(tmp_path):
    file = write_enhanced(tmp_path / "a.dcm", stored_values(), slope=[1] * 4, intercept=[0] * 4, order=range(4))
    dataset = pydicom.dcmread(file)
    dataset.compress(RLELossless)
    fragments = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=4))
    dataset.PixelData = encapsulate(fragments[:3])
    dataset.save_as(file)
    assert "NumberOfFrames 4, but 3 compressed frames" in refusal(tmp_path)


def jpeg_2000(columns: int, rows: int, samples: int = 1) -> bytes:
    """The start of a code stream, with the size that it claims (ISO/IEC 15444-1, A.5.1)."""
    size = b"".join(number.to_bytes(4) for number in (columns, rows, 0, 0, columns, rows, 0, 0))
    return b"\xff\x4f\xff\x51\x00\x29\x00\x00" + size + samples.to_bytes(2) + b"\x0f\x01\x01" * samples + bytes(60)


def jpeg(marker: int, columns: int, rows: int, samples: int = 1) -> bytes:
    """The start of a JPEG (C1: sequential, C3: lossless) or JPEG-LS (F7) stream, after a comment and a table (C4)."""
    frame = b"\x10" + rows.to_bytes(2) + columns.to_bytes(2) + bytes([samples]) + b"\x01\x11\x00" * samples
    comment = b"\xff\xfe\x00\x04\xff\xc0"
    table = b"\xff\xc4\x00\x0a\x08\x00\x01\x00\x01\x01\x01\x11"
    return (
        b"\xff\xd8" + comment + table + b"\xff\xff" + bytes([marker]) + (2 + len(frame)).to_bytes(2) + frame + bytes(60)
    )


@pytest.mark.parametrize(
    ("syntax", "stream", "words"),
    [
        (JPEG2000Lossless, jpeg_2000(60000, 60000), "60000 x 60000 x 1"),
        (JPEG2000Lossless, jpeg_2000(7, 6, 9000), "7 x 6 x 9000"),
        (JPEGLSLossless, jpeg(0xF7, 7, 60000), "7 x 60000 x 1"),
        ("1.2.840.10008.1.2.4.70", jpeg(0xC3, 65500, 6), "65500 x 6 x 1"),
        ("1.2.840.10008.1.2.4.51", jpeg(0xC1, 7, 6, 4), "7 x 6 x 4"),
    ],
    ids=["sides", "samples", "JPEG-LS", "JPEG lossless", "JPEG"],
)
def test_compressed_pixels_larger_than_their_header_are_refused(tmp_path, syntax, stream, words):
    def replace(dataset):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([stream])
        dataset["PixelData"].is_undefined_length = True

    edit(write_series(tmp_path, stored_values()), replace)
    message = refusal(tmp_path)
    assert f"compressed pixels of {words} (columns, rows, samples), but its header says 7 x 6 x 1" in message


# ---- deflate -------------------------------------------------------------------------------------------------------


def deflate(file: Path, content: bytes) -> None:
    """Write a deflated file with this data set after its meta information."""
    meta = pydicom.dcmread(file)
    for tag in list(meta.keys()):
        del meta[tag]
    meta.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    meta.save_as(file)
    head = file.read_bytes()
    length = 132 + 12 + pydicom.filereader.read_file_meta_info(file).FileMetaInformationGroupLength
    engine = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    file.write_bytes(head[:length] + engine.compress(content) + engine.flush())


def test_a_deflated_series_is_read(tmp_path):
    def squeeze(dataset):
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    stored = stored_values((64, 64, 4))
    edit(write_series(tmp_path, stored), squeeze)
    (series,), reasons = find_series(tmp_path.iterdir())
    assert reasons == {}
    np.testing.assert_array_equal(read_series(series).voxels, stored - 1024)


def test_a_deflated_header_that_grows_is_refused(tmp_path):
    """A few KB that become 24 MB of one element before the pixels."""
    (file, *_) = write_series(tmp_path, stored_values((7, 6, 1)))
    text = b"\x08\x00\x81\x00UT\x00\x00" + (24 * MB).to_bytes(4, "little") + b" " * (24 * MB)
    deflate(file, text)
    assert file.stat().st_size < MB
    tracemalloc.start()
    with pytest.raises(RefusedScan, match=r"its header unpacks to more than \d+,\d+,\d+ bytes"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 100 * MB
    tracemalloc.stop()


def test_deflated_pixels_that_grow_are_refused(tmp_path):
    """The header claims 84 bytes of pixels, and 24 MB follow."""
    for file in write_series(tmp_path, stored_values()):
        dataset = pydicom.dcmread(file)
        del dataset.PixelData
        plain = file.with_suffix(".plain")
        dataset.save_as(plain)
        length = 132 + 12 + dataset.file_meta.FileMetaInformationGroupLength
        header = plain.read_bytes()[length:]
        plain.unlink()
        size = 24 * MB
        deflate(file, header + b"\xe0\x7f\x10\x00OW\x00\x00" + size.to_bytes(4, "little") + bytes(size))
    assert "unpacks to more than the 16,777,300 bytes that its header allows" in refusal(tmp_path)


def test_inflating_stops_at_the_limit(tmp_path):
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    (tmp_path / "a").write_bytes(engine.compress(bytes(1000)) + engine.flush())
    for limit, expected in [(999, (999, False)), (1000, (1000, True)), (5000, (1000, True))]:
        with open(tmp_path / "a", "rb") as stream:
            content, complete = inflate(stream, limit)
        assert (len(content), complete) == expected


def test_text_as_a_number_of_frames_is_refused(tmp_path):
    (file, *others) = write_series(tmp_path, stored_values(), syntax="1.2.840.10008.1.2.1")
    for one in (file, *others):
        dataset = pydicom.dcmread(one)
        dataset[Tag("NumberOfFrames")] = DataElement("NumberOfFrames", "LO", "many")
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        dataset.save_as(one)
    assert "NumberOfFrames 'many'" in refusal(tmp_path)


# ---- frames --------------------------------------------------------------------------------------------------------


def write_empty_frames(file: Path, described: int, frames: int) -> None:
    """Write an Enhanced CT image whose frames are described by empty items of 8 bytes."""
    write_enhanced(file, stored_values(), slope=[1] * 4, intercept=[0] * 4, order=range(4))
    dataset = pydicom.dcmread(file)
    dataset.PerFrameFunctionalGroupsSequence = [pydicom.Dataset() for _ in range(described)]
    dataset.NumberOfFrames = frames
    dataset.Rows = dataset.Columns = 1
    dataset.PixelData = bytes(2 * frames)
    dataset.save_as(file)


@pytest.mark.parametrize(
    ("described", "frames", "words"),
    [
        (1, 10_001, "NumberOfFrames 10001, more than the 10,000"),
        (1500, 4, "1,500 items that describe frames, more than the 1,400"),
    ],
)
def test_more_frames_than_any_ct_has_are_refused_before_they_are_read(tmp_path, described, frames, words):
    write_empty_frames(tmp_path / "a.dcm", described, frames)
    assert words in refusal(tmp_path)


def test_a_deflated_header_of_many_empty_items_is_refused_at_once(tmp_path):
    file = tmp_path / "a.dcm"
    write_empty_frames(file, 3000, 4)
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(file)
    assert file.stat().st_size < 4000
    with pytest.raises(RefusedScan, match=r"unpacks to 3,\d+ items, more than 1,"):
        read_header(file)


def with_items(file: Path, count: int, item: bytes = b"\xfe\xff\x00\xe0\0\0\0\0") -> None:
    """Put a private sequence of undefined length, which pydicom reads at once, before the patient's name."""
    content = file.read_bytes()
    at = content.index(b"\x10\x00\x10\x00PN")
    sequence = b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + item * count + b"\xfe\xff\xdd\xe0\0\0\0\0"
    file.write_bytes(content[:at] + sequence + content[at:])


def test_more_items_than_a_file_of_this_size_can_need_are_refused_before_they_are_read(tmp_path):
    files = write_series(tmp_path, stored_values())
    with_items(files[3], 100_000)
    begun = time.process_time()
    _, refused = find_series(files)
    assert time.process_time() - begun < 1
    assert list(refused) == [str(files[3])] and "more than the 35," in refused[str(files[3])]


def test_items_that_hold_something_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(size, "ITEMS_OF_ANY_FILE", 0)
    files = write_series(tmp_path, stored_values())
    with_items(files[3], 1000, b"\xfe\xff\x00\xe0\x1c\0\0\0" + b"\x08\x00\x50\x11UI\x14\0" + b"1.2.3.4.5.6.7.8.9.10")
    (series,), refused = find_series(files)
    np.testing.assert_array_equal(read_series(series).voxels, stored_values() - 1024)
    assert not refused
