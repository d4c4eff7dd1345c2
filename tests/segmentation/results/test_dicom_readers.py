# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Programs of others accept the segmentations: dicom3tools check them, and a DICOM server stores them with their scan."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from bundles.common.scans.dicom_series import find_series, read_series
from bundles.segmentation.results.dicom_segmentation import write_dicom_segmentation

from ...common.scans.dicom_files import write_enhanced, write_series
from ...orthanc import ask, orthanc

SHAPE = (7, 6, 5)
LABEL_MAP = np.random.default_rng(1).integers(0, 3, size=SHAPE).astype(np.uint8)
STORED = np.random.default_rng(0).integers(0, 3000, size=SHAPE)
FRAMES = {"slope": [1] * SHAPE[2], "intercept": [0] * SHAPE[2], "order": [2, 0, 1, 4, 3]}
ODD = {
    "plain": {},
    "odd": {
        "PatientID": "8",
        "StudyInstanceUID": "1.2.3.4",
        "PatientSex": "U",
        "PatientBirthDate": "00000000",
        "PatientName": "Yamada^Tarou=山田^太郎",
        "SpecificCharacterSet": ["", "ISO 2022 IR 87"],
        "StudyDate": "anonymized",
        "StudyTime": "noon",
        "SliceThickness": None,
        "StudyDescription": "long " * 20,
        "PatientAge": "45",
        "PregnancyStatus": 9,
        "Manufacturer": "m" * 80,
    },
    "blank": dict.fromkeys(
        "StudyInstanceUID SeriesInstanceUID SOPInstanceUID SOPClassUID FrameOfReferenceUID PatientID".split(), ""
    ),
    "enhanced": None,
}

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value", "ignore:The value length", "ignore:A value of type")


@pytest.fixture(scope="module", params=list(ODD))
def pair(request, tmp_path_factory) -> tuple[Path, list[Path]]:
    """A segmentation, and the CT files that it was made from."""
    folder = tmp_path_factory.mktemp(request.param)
    tags = ODD[request.param]
    files = (
        [write_enhanced(folder / "ct" / "volume.dcm", STORED, **FRAMES)]
        if tags is None
        else write_series(folder / "ct", STORED, **tags)
    )
    (series,), _ = find_series(files)
    write_dicom_segmentation(
        folder / "seg.dcm",
        label_map=LABEL_MAP,
        labels={0: "background", 1: "spleen", 2: "left_kidney"},
        files=read_series(series).files,
        model_name="model",
        model_version="1",
    )
    return folder / "seg.dcm", files


def output(*command: str | Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (Debian: dicom3tools)")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def test_dciodvfy_finds_no_error(pair):
    found = output("dciodvfy", "-new", pair[0])
    assert "Segmentation" in found and "Error" not in found


def test_dcentvfy_finds_no_contradiction_to_the_scan(pair):
    """Patient, study and frame of reference agree with those of the source images."""
    segmentation, files = pair
    if pydicom.dcmread(files[0]).SeriesInstanceUID:  # else there is nothing to agree with
        assert "Error" not in output("dcentvfy", segmentation, *files)


def test_highdicom_gives_the_label_map_back(pair):
    found = hd.seg.segread(pair[0]).get_volume(combine_segments=True, allow_missing_positions=True)
    assert sorted(np.unique(found.array, return_counts=True)[1]) == sorted(np.unique(LABEL_MAP, return_counts=True)[1])
    for z in range(SHAPE[2]):  # highdicom counts the slices against the normal
        assert any(np.array_equal(found.array[at], LABEL_MAP[:, :, z].T) for at in (z, SHAPE[2] - 1 - z))


# ---- a DICOM server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with orthanc(tmp_path_factory.mktemp("orthanc")) as address:
        yield address


def test_a_server_stores_it_in_the_study_of_the_scan(pair, server):
    segmentation, files = pair
    content = segmentation.read_bytes()
    stored = json.loads(ask(f"{server}/instances", content))
    assert stored["Status"] == "Success"
    assert ask(f"{server}/instances/{stored['ID']}/file") == content
    study = json.loads(ask(f"{server}/instances/{stored['ID']}/study"))
    source = pydicom.dcmread(files[0])
    if source.StudyInstanceUID:
        assert study["MainDicomTags"]["StudyInstanceUID"] == source.StudyInstanceUID
        scan = json.loads(ask(f"{server}/instances", files[0].read_bytes()))
        assert scan["ParentStudy"] == stored["ParentStudy"] and scan["ParentPatient"] == stored["ParentPatient"]
    name = study["PatientMainDicomTags"]["PatientName"]
    assert name.partition("=")[0] == str(source.PatientName).partition("=")[0]  # Orthanc does not decode ISO 2022
