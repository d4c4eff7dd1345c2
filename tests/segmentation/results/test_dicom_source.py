# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Whatever stands in a header: the segmentation is written, legal, on the grid, and the log names what was replaced."""

from __future__ import annotations

import copy
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom import config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import UID, ImplicitVRLittleEndian
from pydicom.valuerep import validate_value

from bundles.common.scans.dicom_headers import read_headers
from bundles.common.scans.dicom_series import DicomVolume, find_series, read_series
from bundles.common.scans.slice_grid import MAX_SHIFT
from bundles.segmentation.results.dicom_segmentation import write_dicom_segmentation

from ...common.scans.dicom_files import items, pixel_bytes, write_enhanced, write_series

SHAPE = (7, 6, 5)
LABELS = {0: "background", 1: "spleen", 2: "liver"}
LABEL_MAP = np.random.default_rng(1).integers(0, 3, size=SHAPE).astype(np.uint8)
STORED = np.random.default_rng(0).integers(0, 3000, size=SHAPE)
REQUIRED = ("StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID")


def put(dataset: Dataset, keyword: str, value, vr: str = "") -> None:
    """Set a value without any check of pydicom; ``vr`` is a wrong one, and None removes the element."""
    tag = tag_for_keyword(keyword)
    if value is None:
        dataset.pop(tag, None)
        return
    dataset[tag] = DataElement(tag, vr or dictionary_VR(tag), value, validation_mode=config.IGNORE)


def make_series(folder: Path, *changes: tuple, implicit: bool = False) -> DicomVolume:
    """Write a series whose headers have these values, each (keyword, value) or (keyword, value, VR)."""
    files = write_series(folder, STORED)
    for z, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        for keyword, value, *vr in changes:
            put(dataset, keyword, value(z) if callable(value) else value, *vr)
        if implicit:  # readers then take the VR from the dictionary
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        dataset.save_as(file)
    (series,), reasons = find_series(folder.iterdir())
    assert reasons == {}
    return read_series(series)


def save(path: Path, volume: DicomVolume, labels=LABELS) -> Dataset:
    write_dicom_segmentation(
        path, label_map=LABEL_MAP, labels=labels, files=volume.files, model_name="model", model_version="1"
    )
    return pydicom.dcmread(path)


def assert_legal(segmentation: Dataset) -> None:
    """Every value has the form that pydicom knows for its kind; the UIDs that must be there are."""
    for element in segmentation.iterall():
        values = element.value if element.VM > 1 else [element.value]
        for value in values if element.VR != "SQ" and element.value not in (None, "") else ():
            validate_value(element.VR, str(value) if element.VR in ("PN", "DS", "IS") else value, config.RAISE)
    for keyword in REQUIRED:
        assert UID(segmentation[keyword].value).is_valid
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        assert UID(source.ReferencedSOPInstanceUID).is_valid


def assert_on_the_grid(path: Path, volume: DicomVolume) -> None:
    """highdicom's own reader gives the label map back, where the mask has it."""
    image = hd.seg.segread(path)
    read = image.get_volume(combine_segments=True, segment_numbers=[1, 2], allow_missing_positions=True)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ read.affine  # planes, rows, columns
    to_voxel = np.linalg.inv(volume.affine) @ to_ras
    found = np.zeros(SHAPE, np.uint8)
    for index in np.argwhere(read.array):
        voxel = (to_voxel @ [*index, 1])[:3]
        shift = np.linalg.norm((volume.affine @ [*np.rint(voxel), 1] - to_ras @ [*index, 1])[:3])
        assert shift < MAX_SHIFT
        found[tuple(np.rint(voxel).astype(int))] = read.array[tuple(index)]
    np.testing.assert_array_equal(found, LABEL_MAP)


EMPTIED = [
    ("PatientSex", "U"),
    ("PatientSex", "male"),
    ("PatientSex", ["M", "F"]),
    ("PatientSex", "m"),
    ("PatientBirthDate", "00000000"),
    ("PatientBirthDate", "19500230"),
    ("PatientBirthDate", "unknown"),
    ("PatientBirthDate", "1950-02-03"),
    ("PatientBirthDate", "a text", "LO"),
    ("StudyDate", "anonymized"),
    ("StudyDate", "20201301"),
    ("StudyTime", "256199"),
    ("StudyTime", "10:99"),
    ("StudyTime", "noon"),
    ("PatientID", "7" * 65),
    ("PatientID", "a\x07b"),
    ("PatientID", ["1", "2"]),
    ("PatientName", "D" * 70 + "^Jane"),
    ("PatientName", "a=b=c=d"),
    ("PatientName", ["Doe^Jane", "Roe^Jane"]),
    ("StudyID", "much longer than sixteen"),
    ("AccessionNumber", "12345678901234567"),
    ("ReferringPhysicianName", "a=b=c=d=e"),
]
LEFT_OUT = [
    ("StudyDescription", "long " * 20),
    ("PatientAge", "45"),
    ("PatientAge", "45 years"),
    ("PatientWeight", "heavy", "LO"),
    ("PatientSize", "inf", "LO"),
    ("PatientIdentityRemoved", "maybe"),
    ("PregnancyStatus", 9),
    ("OtherPatientIDsSequence", [items(PatientID="8" * 80)]),
    ("Manufacturer", "m" * 80),
    ("AcquisitionDateTime", "yesterday"),
    ("LossyImageCompression", "perhaps"),
]


@pytest.mark.parametrize("change", [*EMPTIED, *LEFT_OUT], ids=lambda change: f"{change[0]}={str(change[1])[:20]}")
def test_a_value_that_is_not_allowed_is_replaced_and_named(tmp_path, caplog, change):
    volume = make_series(tmp_path / "ct", change)
    segmentation = save(tmp_path / "seg.dcm", volume)
    keyword, value = change[:2]
    if change in EMPTIED:
        assert segmentation[keyword].value in (None, "") and "now empty" in caplog.text
    else:
        assert keyword not in segmentation or segmentation[keyword].value != value
        assert "left out" in caplog.text
    shown = "\\".join(value) if isinstance(value, list) and isinstance(value[0], str) else value
    assert f"{keyword} {repr(str(shown))[:30]}" in caplog.text or isinstance(shown, list)
    assert_legal(segmentation)
    assert_on_the_grid(tmp_path / "seg.dcm", volume)
    warnings = [record for record in caplog.records if record.levelname == "WARNING" and "seg.dcm" in record.message]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("PatientWeight", "71.123456789012345678", "LO"), pytest.approx(71.12345678901235, abs=1e-12)),
        (("PatientID", 12345, "IS"), "12345"),
        (("PatientSize", "1.8", "LO"), 1.8),
        (("PatientComments", "one\\two\r\nthree", "LT"), "one\\two\r\nthree"),
        (("StudyDate", "20200102", "LO"), "20200102"),
    ],
)
def test_a_value_in_a_wrong_form_is_kept_in_the_right_one(tmp_path, caplog, change, expected):
    segmentation = save(tmp_path / "seg.dcm", make_series(tmp_path / "ct", change))
    assert segmentation[change[0]].value == expected
    assert segmentation[change[0]].VR == dictionary_VR(tag_for_keyword(change[0]))
    assert change[0] not in caplog.text
    assert_legal(segmentation)


@pytest.mark.parametrize("keyword", ["PatientWeight", "PatientSize"])
def test_text_that_pydicom_cannot_convert_is_left_out(tmp_path, caplog, keyword):
    volume = make_series(tmp_path / "ct", (keyword, "tall", "LO"), implicit=True)
    assert keyword not in save(tmp_path / "seg.dcm", volume)
    assert f"{keyword} 'tall', left out" in caplog.text


@pytest.mark.parametrize(
    ("value", "name", "expected", "message"),
    [
        (
            ["", "ISO 2022 IR 87"],
            "Yamada^Tarou=山田^太郎",
            ["ISO 2022 IR 6", "ISO 2022 IR 87"],
            r"'\\ISO 2022 IR 87', now ISO 2022 IR 6\ISO 2022 IR 87",
        ),
        (["", "ISO 2022 IR 999"], "Doe^Jane", "ISO_IR 192", r"'\\ISO 2022 IR 999', now ISO_IR 192"),
        ("ISO_IR 999", "Doe^Jane", "ISO_IR 192", "'ISO_IR 999', now ISO_IR 192"),
        ("latin1", "Doe^Jane", "ISO_IR 192", "'latin1', now ISO_IR 192"),
        (["ISO_IR 100", "ISO_IR 100"], "Doe^Jane", "ISO_IR 192", r"'ISO_IR 100\\ISO_IR 100', now ISO_IR 192"),
        ("ISO_IR 100", "Müller^Jörg", "ISO_IR 100", ""),
        ("ISO_IR 192", "山田^太郎", "ISO_IR 192", ""),
        ("", "Doe^Jane", None, ""),
        (None, "Müller^Jörg", "ISO_IR 100", "missing although a text is not ASCII, now ISO_IR 100"),
    ],
)
def test_names_survive_odd_character_sets(tmp_path, caplog, value, name, expected, message):
    changes = [("SpecificCharacterSet", value), ("PatientName", name)]
    volume = make_series(tmp_path / "ct", *changes)
    segmentation = save(tmp_path / "seg.dcm", volume)
    assert segmentation.get("SpecificCharacterSet") == expected
    assert segmentation.PatientName == name
    assert (f"SpecificCharacterSet {message}" in caplog.text) if message else ("replaced" not in caplog.text)
    assert_legal(segmentation)


def test_a_name_that_its_character_set_does_not_have_is_left_empty(tmp_path, caplog):
    """As where Latin-1 is declared to be UTF-8: a name with another letter would be of another patient."""
    volume = make_series(tmp_path / "ct", ("SpecificCharacterSet", "ISO_IR 100"), ("PatientName", "Müller^Jörg"))
    for file in volume.files:
        content = Path(file).read_bytes()
        assert content.count(b"ISO_IR 100") == 1
        Path(file).write_bytes(content.replace(b"ISO_IR 100", b"ISO_IR 192"))
    segmentation = save(tmp_path / "seg.dcm", volume)
    assert not segmentation.PatientName
    assert "now empty (not readable in its character set)" in caplog.text
    assert_legal(segmentation)


def test_a_label_that_the_character_set_cannot_write_is_written(tmp_path, caplog):
    volume = make_series(tmp_path / "ct", ("SpecificCharacterSet", "ISO_IR 100"), ("PatientName", "Müller^Jörg"))
    segmentation = save(tmp_path / "seg.dcm", volume, LABELS | {1: "脾臓", 2: "a\\b" * 40})
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == ["脾臓", ("a/b" * 40)[:64]]
    assert segmentation.PatientName == "Müller^Jörg" and "replaced" not in caplog.text


@pytest.mark.parametrize("value", [None, "", "anonymized", "1.2.x", "1.2.", "0", "1.2" * 22])
@pytest.mark.parametrize("keyword", [*REQUIRED[:3], "SeriesInstanceUID"])
def test_a_missing_uid_is_a_new_one_that_a_resumed_run_makes_again(tmp_path, caplog, keyword, value):
    volume = make_series(tmp_path / "ct", (keyword, value))
    before = copy.deepcopy(read_headers(volume.files))
    one, other = (save(tmp_path / f"{name}.dcm", volume) for name in "ab")
    assert f"{keyword} {'missing' if not value else repr(value)}"[:20] in caplog.text
    for segmentation in (one, other):
        assert_legal(segmentation)
    assert one.StudyInstanceUID == other.StudyInstanceUID and one.FrameOfReferenceUID == other.FrameOfReferenceUID
    assert one.ReferencedSeriesSequence == other.ReferencedSeriesSequence
    assert one.SOPInstanceUID != other.SOPInstanceUID
    assert len({ref.ReferencedSOPInstanceUID for ref in one.SourceImageSequence}) == SHAPE[2]
    assert read_headers(volume.files) == before  # others share them
    assert_on_the_grid(tmp_path / "a.dcm", volume)


def test_two_series_without_uids_never_share_one(tmp_path):
    """They differ only in one voxel: their patients may be two."""
    blank = [(keyword, "") for keyword in (*REQUIRED, "PatientID")]
    found = []
    for name in "ab":
        volume = make_series(tmp_path / name, *blank)
        if name == "b":
            dataset = pydicom.dcmread(volume.files[2])
            dataset.PixelData = pixel_bytes(STORED[:, :, 2] + 1)
            dataset.save_as(volume.files[2])
        segmentation = save(tmp_path / f"{name}.dcm", volume)
        assert_legal(segmentation)
        sources = [ref.ReferencedSOPInstanceUID for ref in segmentation.SourceImageSequence]
        series = segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID
        found.append({segmentation.StudyInstanceUID, segmentation.FrameOfReferenceUID, series, *sources})
    assert len(found[0]) == len(found[1]) == 3 + SHAPE[2] and not found[0] & found[1]


def test_uids_of_an_archive_are_kept_even_if_their_form_is_wrong(tmp_path, caplog):
    """With a new one, the segmentation would belong to another study."""
    volume = make_series(tmp_path / "ct", ("StudyInstanceUID", "1.2.03.4"))
    assert save(tmp_path / "seg.dcm", volume).StudyInstanceUID == "1.2.03.4"
    assert "replaced" not in caplog.text


def test_one_uid_in_all_files_names_none_of_them(tmp_path, caplog):
    volume = make_series(tmp_path / "ct", ("SOPInstanceUID", "1.2.3"))
    segmentation = save(tmp_path / "seg.dcm", volume)
    assert len({ref.ReferencedSOPInstanceUID for ref in segmentation.SourceImageSequence}) == SHAPE[2]
    assert "SOPInstanceUID the same in several files, now new ones" in caplog.text
    assert_legal(segmentation)


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_uid_that_changes_within_the_volume_is_that_of_the_first_slice(tmp_path, caplog, keyword):
    volume = make_series(tmp_path / "ct", (keyword, lambda z: f"1.2.{1 + z % 2}"))
    assert save(tmp_path / "seg.dcm", volume)[keyword].value == "1.2.1"
    assert f"{keyword} 2 values in one volume" in caplog.text


@pytest.mark.parametrize("value", [None, "", "thin", "0", "-3", ["2", "3"]])
def test_a_missing_thickness_is_the_distance_of_the_slices(tmp_path, caplog, value):
    volume = make_series(tmp_path / "ct", ("SliceThickness", value, "LO"))
    segmentation = save(tmp_path / "seg.dcm", volume)
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == 2.5 and "now the distance of the slices, 2.5 mm" in caplog.text
    assert_legal(segmentation)


@pytest.mark.parametrize("where", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_the_thickness_of_an_enhanced_image_is_kept(tmp_path, caplog, where):
    file = write_enhanced(tmp_path / "ct" / "a.dcm", STORED, slope=[1] * 5, intercept=[0] * 5, order=range(5))
    dataset = pydicom.dcmread(file)
    (measures,) = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    measures.SliceThickness = 4
    if where.startswith("Per"):
        del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        for groups in dataset.PerFrameFunctionalGroupsSequence:
            groups.PixelMeasuresSequence = [measures]
    dataset.save_as(file)
    (series,), _ = find_series([file])
    segmentation = save(tmp_path / "out.dcm", read_series(series))
    (measures,) = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SliceThickness == 4 and "SliceThickness" not in caplog.text


def test_a_legal_header_is_copied_and_nothing_is_said(tmp_path, caplog):
    extra = {
        "PatientBirthDate": "19500203",
        "PatientSex": "F",
        "PatientAge": "045Y",
        "PatientWeight": "71.5",
        "StudyDate": "20200102",
        "StudyTime": "101112.5",
        "StudyDescription": "abdomen",
        "Manufacturer": "maker",
        "OtherPatientIDsSequence": [items(PatientID="8", TypeOfPatientID="TEXT")],
    }
    segmentation = save(tmp_path / "seg.dcm", make_series(tmp_path / "ct", *extra.items()))
    for keyword, value in extra.items():
        if keyword == "Manufacturer":
            value, found = "maker", segmentation.ContributingEquipmentSequence[0].Manufacturer
        else:
            found = segmentation[keyword].value
        assert str(found) == value or list(found) == value
    assert "replaced" not in caplog.text


# ---- grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        ("ImageOrientationPatient", lambda z: [1, 1e-6 * (z % 2), 0, 0, 1, 0]),
        ("ImageOrientationPatient", lambda z: [1, 9e-5 * (z % 2), 0, -9e-5 * (z % 2), 1, 0]),
        ("PixelSpacing", lambda z: [0.5 + 9e-5 * (z % 2), 0.75]),
        ("ImagePositionPatient", lambda z: [-120.25 + 0.06 * (z % 2), -98.5, 310.75 + 2.5 * z]),
        ("ImagePositionPatient", lambda z: [-120.25, -98.5, 310.75 + 2.5 * z + 0.05 * (z == 2)]),
    ],
)
def test_slices_that_differ_as_far_as_is_read_are_written_on_one_grid(tmp_path, change):
    volume = make_series(tmp_path / "ct", change)
    segmentation = save(tmp_path / "seg.dcm", volume)
    assert segmentation.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    assert_on_the_grid(tmp_path / "seg.dcm", volume)


def test_places_that_are_exact_are_copied(tmp_path):
    volume = make_series(tmp_path / "ct")
    stored = {tuple(header.ImagePositionPatient) for header in read_headers(volume.files).values()}
    groups = save(tmp_path / "seg.dcm", volume).PerFrameFunctionalGroupsSequence
    assert {tuple(group.PlanePositionSequence[0].ImagePositionPatient) for group in groups} == stored


@pytest.mark.parametrize("files", [1, 5])
def test_frames_with_an_orientation_of_their_own_are_written(tmp_path, files):
    """In one Enhanced image, or in one for each slice."""
    for number in range(files):
        own = range(SHAPE[2]) if files == 1 else [number]
        file = write_enhanced(
            tmp_path / "ct" / f"{number}.dcm", STORED, slope=[1] * SHAPE[2], intercept=[0] * SHAPE[2], order=own
        )
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID, dataset.PatientSex = "1.2.3", "F"
        shared = dataset.SharedFunctionalGroupsSequence[0]
        for z, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            group.PlaneOrientationSequence = [items(ImageOrientationPatient=[1, 1e-6 * z, 0, 0, 1, 0])]
        del shared.PlaneOrientationSequence
        dataset.save_as(file)
    (series,), _ = find_series((tmp_path / "ct").iterdir())
    volume = read_series(series)
    segmentation = save(tmp_path / "seg.dcm", volume)
    assert len(segmentation.SourceImageSequence) == files
    assert_on_the_grid(tmp_path / "seg.dcm", volume)
