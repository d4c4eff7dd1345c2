# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A header is read once, whoever needs it, and again if its file changes. (What is read: see test_dicom_series.py.)"""

from __future__ import annotations

import numpy as np
import pydicom
import pytest

from bundles.common.scans import dicom_headers
from bundles.common.scans.dicom_headers import read_header, read_headers
from bundles.common.scans.dicom_series import find_series, read_series

from .dicom_files import write_series


@pytest.fixture(autouse=True)
def read(monkeypatch):
    """Names of the files that pydicom opens, without and with pixels."""
    dicom_headers._kept.clear()
    headers, whole, dcmread = [], [], pydicom.dcmread

    def recorded(file, *arguments, **options):
        (headers if options.get("stop_before_pixels") else whole).append(str(file))
        return dcmread(file, *arguments, **options)

    monkeypatch.setattr(pydicom, "dcmread", recorded)
    return headers, whole


def test_grouping_and_reading_a_series_read_each_header_once(tmp_path, read):
    stored = np.arange(4 * 3 * 5, dtype=np.int16).reshape(4, 3, 5)
    files = sorted(map(str, write_series(tmp_path, stored)))
    (series,), _ = find_series(files)
    volume = read_series(series)
    read_headers(volume.files)
    assert (volume.voxels == stored - 1024).all()
    headers, whole = read
    assert sorted(headers) == files and sorted(whole) == files


def test_a_changed_file_is_read_again(tmp_path):
    (file, *_) = write_series(tmp_path, np.zeros((4, 3, 3), np.int16), PatientID="one")
    assert read_header(file).PatientID == "one"
    write_series(tmp_path, np.zeros((4, 3, 3), np.int16), PatientID="another")
    assert read_header(file).PatientID == "another"


def test_the_number_of_kept_headers_is_limited(tmp_path, monkeypatch, read):
    monkeypatch.setattr(dicom_headers, "KEPT_HEADERS", 2)
    files = write_series(tmp_path, np.zeros((4, 3, 3), np.int16))
    for file in (*files, files[2], files[0]):
        read_header(file)
    assert read[0] == [str(file) for file in (*files, files[0])]


def test_copies_are_found_whether_or_not_their_numbers_were_converted(tmp_path):
    """Groups are formed by values as they are stored; whoever used a header before must not matter."""
    files = write_series(tmp_path / "a", np.zeros((4, 3, 3), np.int16), AcquisitionNumber=7)
    for file in files:
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
        assert read_header(file).AcquisitionNumber == 7
    (series,), _ = find_series([*tmp_path.rglob("*.dcm")])
    assert len(series.files) == 3


def test_an_unknown_character_set_is_named_once(tmp_path, caplog):
    for seed in (1, 2):
        write_series(tmp_path / f"{seed}", np.zeros((4, 3, 3), np.int16))
    for file in tmp_path.rglob("*.dcm"):
        content = pydicom.dcmread(file)
        content.PatientName = "Doe^Jane"
        content.SpecificCharacterSet = "ISO_IR 100"
        content.save_as(file)
        file.write_bytes(file.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 999"))
    caplog.clear()
    dicom_headers._character_sets.clear()
    series, _ = find_series(tmp_path.rglob("*.dcm"))
    for one in series:
        read_series(one)
    assert len(series) == 2 and caplog.text.count("ISO_IR 999") == 1
    assert "unknown SpecificCharacterSet ISO_IR 999" in caplog.text
