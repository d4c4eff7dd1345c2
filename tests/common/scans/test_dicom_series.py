# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A CT series comes out in HU where it lies in the patient, or is refused for a reason that a user can act on."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    RLELossless,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)

from bundles.common.errors import NoScan, RefusedScan
from bundles.common.scans import dicom_headers
from bundles.common.scans.dicom_headers import is_dicom
from bundles.common.scans.dicom_series import DicomVolume, find_series, read_series

from .dicom_files import AXIAL, POSITION, SPACING, pixel_bytes, set_or_remove, write_enhanced, write_series

SHAPE = (7, 6, 9)
CORONAL = (1, 0, 0, 0, 0, -1)
FEET_FIRST = (-1, 0, 0, 0, 1, 0)
OBLIQUE = (0.8, 0.36, 0.48, -0.6, 0.48, 0.64)  # two unit vectors at right angles
GRADED = [1 + 0.25 * z for z in range(SHAPE[2])]  # a slope for each slice
FALLING = [-1000.0 - z for z in range(SHAPE[2])]  # an intercept for each slice


def stored_values(shape=SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3072, size=shape)


def files_in(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file()]


def read(folder: Path) -> DicomVolume:
    """Read the one series of a folder."""
    series, reasons = find_series(files_in(folder))
    assert len(series) == 1 and reasons == {}
    return read_series(series[0])


def refusal(folder: Path) -> str:
    series, _ = find_series(files_in(folder))
    assert len(series) == 1
    with pytest.raises(RefusedScan) as refused:
        read_series(series[0])
    return str(refused.value)


def ras_of(voxel, *, orientation=AXIAL, position=POSITION, spacing=SPACING) -> list[float]:
    """Millimetres of a voxel, as the standard's formula says, number by number; RAS is LPS with two signs turned."""
    r, c = orientation[:3], orientation[3:]
    n = [r[1] * c[2] - r[2] * c[1], r[2] * c[0] - r[0] * c[2], r[0] * c[1] - r[1] * c[0]]
    (x, y, z), (dx, dy, dz) = voxel, spacing
    lps = [position[i] + x * dx * r[i] + y * dy * c[i] + z * dz * n[i] for i in range(3)]
    return [-lps[0], -lps[1], lps[2]]


def assert_lies_true(affine: np.ndarray, **grid) -> None:
    for voxel in [(0, 0, 0), (6, 0, 0), (0, 5, 0), (0, 0, 8), (3, 2, 1), (6, 5, 8)]:
        np.testing.assert_allclose(affine @ [*voxel, 1], [*ras_of(voxel, **grid), 1], rtol=0, atol=1e-6)


# ---- voxels and grid -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, FEET_FIRST, OBLIQUE, (0, 1, 0, 0, 0, -1)])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_a_shuffled_series_comes_out_as_it_was_made(tmp_path, orientation, seed):
    stored = stored_values()
    files = write_series(tmp_path, stored, orientation=orientation, seed=seed)
    volume = read(tmp_path)
    assert volume.voxels.dtype == np.int16 and volume.affine.dtype == np.float64
    np.testing.assert_array_equal(volume.voxels, stored - 1024)
    assert_lies_true(volume.affine, orientation=orientation)
    assert volume.files == tuple(map(str, files))


def test_slices_made_from_the_far_end_come_out_along_the_normal(tmp_path):
    """As scanned from head to feet: the first image lies highest."""
    stored = stored_values()
    files = write_series(tmp_path, stored, offsets=[-2.5 * z for z in range(9)], seed=None)
    volume = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels, stored[:, :, ::-1] - 1024)
    assert_lies_true(volume.affine, position=(POSITION[0], POSITION[1], POSITION[2] - 8 * 2.5))
    assert volume.files == tuple(map(str, reversed(files)))


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [
        (1, -1024, np.int16),
        (2, 0, np.int16),
        (0.5, -1024, np.float32),
        (1, -1024.5, np.float32),
        (20, -1024, np.float32),  # whole, but beyond the range of int16
        (GRADED, FALLING, np.float32),
        ([1 + z % 2 for z in range(9)], FALLING, np.int16),
    ],
)
def test_hu_follow_the_rescale_of_each_slice(tmp_path, slope, intercept, dtype):
    stored = stored_values()
    write_series(tmp_path, stored, slope=slope, intercept=intercept)
    expected = np.zeros(SHAPE)
    for z in range(9):
        expected[:, :, z] = stored[:, :, z] * np.broadcast_to(slope, 9)[z] + np.broadcast_to(intercept, 9)[z]
    volume = read(tmp_path)
    assert volume.voxels.dtype == dtype
    np.testing.assert_array_equal(volume.voxels, expected.astype(np.float32))


def test_padding_keeps_its_value(tmp_path):
    stored = stored_values()
    stored[:2] = -2000
    write_series(tmp_path, stored, PixelPaddingValue=-2000, intercept=0)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored)


@pytest.mark.parametrize("unsigned", [True, False])
def test_what_stands_in_the_unused_bits_is_no_value(tmp_path, unsigned):
    """12 bits stored in 16: old scanners drew overlays into the others."""
    stored = stored_values() + 1024 if unsigned else stored_values() // 2
    marks = np.random.default_rng(1).integers(0, 16, size=SHAPE) << 12
    write_series(tmp_path, (stored & 0xFFF) | marks, unsigned=unsigned, bits=12)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored - 1024)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
@pytest.mark.parametrize("unsigned", [True, False])
def test_compressed_series_are_read(tmp_path, syntax, unsigned):
    stored = stored_values() + 1024 * unsigned
    write_series(tmp_path, stored, unsigned=unsigned, syntax=syntax)
    assert pydicom.dcmread(files_in(tmp_path)[0]).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read(tmp_path).voxels, stored - 1024)


@pytest.mark.parametrize(
    ("code", "syntax"),
    [
        (gdcm.TransferSyntax.JPEGLosslessProcess14_1, "1.2.840.10008.1.2.4.70"),
        (gdcm.TransferSyntax.JPEG2000Lossless, "1.2.840.10008.1.2.4.90"),
    ],
)
@pytest.mark.parametrize("unsigned", [True, False])
def test_series_compressed_by_another_program_are_read(tmp_path, code, syntax, unsigned):
    stored = stored_values((24, 20, 8)) + 1024 * unsigned
    for file in write_series(tmp_path, stored, unsigned=unsigned):
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(file))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(code))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(file))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read(tmp_path).voxels, stored - 1024)


@pytest.mark.parametrize("legacy", [False, True])
def test_an_enhanced_image_is_read_frame_by_frame(tmp_path, legacy):
    stored = stored_values()
    file = write_enhanced(
        tmp_path / "volume.dcm",
        stored,
        orientation=OBLIQUE,
        slope=GRADED,
        intercept=FALLING,
        order=[3, 1, 2, 0, 4, 8, 7, 6, 5],
        legacy=legacy,
    )
    volume = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels, (stored * np.array(GRADED) + FALLING).astype(np.float32))
    assert_lies_true(volume.affine, orientation=OBLIQUE)
    assert volume.files == (str(file),) * 9


# ---- finding -------------------------------------------------------------------------------------------------------


def test_series_are_found_whatever_the_files_are_called(tmp_path):
    first = write_series(tmp_path / "all", stored_values(), suffix="", SeriesDescription="portal venous")
    second = write_series(tmp_path / "all" / "deep" / "er", stored_values(), suffix=".IMA", PatientID="patient 8")
    for i, file in enumerate(first + second):  # both in one folder too
        if i % 2:
            shutil.move(file, tmp_path / "all" / f"{i}")
    series, reasons = find_series(files_in(tmp_path))
    assert reasons == {}
    assert sorted((one.patient_id, one.description, len(one.files)) for one in series) == [
        ("patient 7", "portal venous", 9),
        ("patient 8", "abdomen", 9),
    ]
    for one in series:
        header = pydicom.dcmread(one.files[0])
        assert (one.series_uid, one.study_uid) == (header.SeriesInstanceUID, header.StudyInstanceUID)
        assert one.modality == "CT" and one.files == tuple(sorted(one.files))
        np.testing.assert_array_equal(read_series(one).voxels, stored_values() - 1024)


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_the_preamble_are_read(tmp_path, implicit):
    for file in write_series(tmp_path, stored_values()):
        dataset = pydicom.dcmread(file)
        dataset.preamble = None
        del dataset.file_meta
        dataset.save_as(file, implicit_vr=implicit, little_endian=True)
        assert file.read_bytes()[128:132] != b"DICM" and is_dicom(file)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


def test_a_copied_file_counts_once(tmp_path, caplog):
    files = write_series(tmp_path, stored_values())
    shutil.copy(files[4], tmp_path / "zz copy of it.dcm")
    with caplog.at_level(logging.INFO):
        volume = read(tmp_path)
    assert volume.files == tuple(map(str, files))
    assert "1 files that are copies" in caplog.text and "zz copy of it.dcm" in caplog.text


def test_one_instance_uid_at_several_positions_is_no_copy(tmp_path):
    uid = generate_uid()
    write_series(tmp_path, stored_values(), SOPInstanceUID=uid)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


def test_files_that_are_no_part_of_a_series_are_named_with_the_reason(tmp_path, monkeypatch):
    files = write_series(tmp_path, stored_values())
    bad = {
        name: tmp_path / name for name in ("empty", "notes.txt", "scan.nii", "cut.dcm", "DICOMDIR", "locked", "gone")
    }
    bad["empty"].touch()
    bad["notes.txt"].write_text("patient 7 has two series")
    bad["scan.nii"].write_bytes(b"\x5c\x01\x00\x00" + bytes(1000))
    bad["cut.dcm"].write_bytes(files[0].read_bytes()[:500])
    directory = pydicom.dcmread(files[0], stop_before_pixels=True)
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    del directory.SeriesInstanceUID
    directory.save_as(bad["DICOMDIR"])
    shutil.copy(files[0], bad["locked"])

    def open_or_deny(file, *args):
        if Path(file) == bad["locked"]:
            raise PermissionError(13, "Permission denied", str(file))
        return open(file, *args)

    monkeypatch.setattr("bundles.common.scans.dicom_headers.open", open_or_deny, raising=False)
    series, reasons = find_series([*files, *bad.values()])
    assert [one.files for one in series] == [tuple(sorted(map(str, files)))]
    words = {
        "empty": "empty (0 bytes)",
        "notes.txt": "not a DICOM file",
        "scan.nii": "not a DICOM file",
        "cut.dcm": "truncated",
        "DICOMDIR": "no SeriesInstanceUID",
        "locked": "cannot be opened (Permission denied)",
        "gone": "cannot be opened (No such file or directory)",
    }
    assert set(reasons) == {str(file) for file in bad.values()}
    for name, word in words.items():
        assert word in reasons[str(bad[name])]


def test_only_headers_are_read_to_find_series(tmp_path, monkeypatch):
    files = write_series(tmp_path, stored_values((64, 64, 9)))
    for file in files:
        os.truncate(file, file.stat().st_size - 64 * 64 * 2)
    (series,), reasons = find_series(files)
    assert len(series.files) == 9 and reasons == {}


def test_objects_of_other_kinds_are_series_of_their_modality(tmp_path):
    for modality, kind in [("RTSTRUCT", RTStructureSetStorage), ("SEG", SegmentationStorage), ("MR", MRImageStorage)]:
        write_series(tmp_path / modality, stored_values((7, 6, 1)), Modality=modality, SOPClassUID=kind, Rows=None)
    series, reasons = find_series(files_in(tmp_path))
    assert {one.modality for one in series} == {"RTSTRUCT", "SEG", "MR"} and reasons == {}


@pytest.mark.parametrize(
    "other",
    [
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        {"orientation": CORONAL},
        {"shape": (9, 6, 2)},
    ],
)
def test_a_series_that_holds_two_stacks_is_split(tmp_path, other):
    uid = generate_uid()
    axial = write_series(tmp_path / "axial", stored_values(), SeriesInstanceUID=uid)
    odd = stored_values(other.pop("shape", (7, 6, 2)))
    write_series(tmp_path / "other", odd, SeriesInstanceUID=uid, **other)
    series, _ = find_series(files_in(tmp_path))
    assert [(len(one.files), one.series_uid) for one in series] == [(9, uid), (2, uid)]
    assert read_series(series[0]).files == tuple(map(str, axial))


ORIGINAL, DERIVED = ["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "PRIMARY", "AXIAL"]
EVERY_SECOND = [z % 2 == 1 for z in range(9)]
SECOND_HALF = [z > 4 for z in range(9)]


@pytest.mark.parametrize("where", [EVERY_SECOND, SECOND_HALF])
@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("ImageType", [ORIGINAL, DERIVED]),
        ("ImageType", [[*ORIGINAL, "CT_SOM5 SPI"], [*ORIGINAL, "CT_SOM5 SEQ"]]),
        ("ImageType", [ORIGINAL, None]),
        ("SeriesDescription", ["abdomen", "abdomen cont."]),
        ("StudyInstanceUID", [generate_uid(), generate_uid()]),
    ],
)
def test_a_tag_that_changes_within_a_volume_does_not_split_it(tmp_path, keyword, values, where):
    """Split, every second slice or half of them would pass for a volume."""

    def change(dataset, z):
        set_or_remove(dataset, keyword, values[where[z]])

    files = write_series(tmp_path, stored_values(), edit=change)
    volume = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels, stored_values() - 1024)
    assert volume.files == tuple(map(str, files))
    assert_lies_true(volume.affine)


@pytest.mark.parametrize("where", [EVERY_SECOND, SECOND_HALF])
def test_one_even_stack_of_two_patients_is_refused_by_the_files(tmp_path, where):
    def change(dataset, z):
        dataset.PatientID = f"patient {where[z]}"

    files = write_series(tmp_path, stored_values(), seed=None, edit=change)
    message = refusal(tmp_path)
    assert files[0].name in message and files[where.index(True)].name in message and "PatientID" in message


@pytest.mark.parametrize("where", [EVERY_SECOND, SECOND_HALF])
def test_directions_that_differ_too_much_to_read_are_refused_and_not_split(tmp_path, where):
    def turn(dataset, z):
        if where[z]:
            dataset.ImageOrientationPatient = [0.999998, 0.002, 0, -0.002, 0.999998, 0]

    write_series(tmp_path, stored_values(), edit=turn)
    assert "in orientation" in refusal(tmp_path)


@pytest.mark.parametrize("uids", [{}, {"SOPInstanceUID": generate_uid()}])
def test_two_image_types_at_the_same_places_are_two_volumes(tmp_path, uids):
    uid = generate_uid()
    for name, kind, seed in [("1", ORIGINAL, 1), ("2", [*DERIVED, "MAR"], 2)]:
        write_series(tmp_path / name, stored_values(seed=seed), SeriesInstanceUID=uid, ImageType=kind, **uids)
    series, _ = find_series(files_in(tmp_path))
    assert [Path(file).parent.name for one in series for file in one.files] == ["1"] * 9 + ["2"] * 9
    for one, seed in zip(series, (1, 2), strict=True):
        np.testing.assert_array_equal(read_series(one).voxels, stored_values(seed=seed) - 1024)


@pytest.mark.parametrize(
    ("slices", "kinds"),
    [(9, [ORIGINAL, ORIGINAL]), (2, [ORIGINAL, DERIVED])],  # nothing tells them apart; half a scan is left over
)
def test_slices_at_one_place_that_no_image_type_sorts_out_are_refused(tmp_path, slices, kinds):
    uid = generate_uid()
    write_series(tmp_path / "1", stored_values(), SeriesInstanceUID=uid, ImageType=kinds[0])
    write_series(tmp_path / "2", stored_values((7, 6, slices)), SeriesInstanceUID=uid, ImageType=kinds[1])
    assert "share a position, image000" in refusal(tmp_path) and f"({slices} such pairs)" in refusal(tmp_path)


def test_one_instance_uid_and_place_in_two_acquisitions_is_no_copy(tmp_path):
    """Taken for copies, the slices of the one would fill the gaps of the other, by the names of the files."""
    uids = {"SeriesInstanceUID": generate_uid(), "SOPInstanceUID": generate_uid()}
    for number in (1, 2):
        write_series(tmp_path / f"{number}", stored_values(seed=number), AcquisitionNumber=number, **uids)
    volumes = [read_series(one) for one in find_series(files_in(tmp_path))[0]]
    for volume, seed in zip(volumes, (1, 2), strict=True):
        np.testing.assert_array_equal(volume.voxels, stored_values(seed=seed) - 1024)


def test_equal_headers_with_other_pixels_are_no_copy(tmp_path):
    uids = {"SeriesInstanceUID": generate_uid(), "SOPInstanceUID": generate_uid()}
    for number in (1, 2):
        write_series(tmp_path / f"{number}", stored_values(seed=number), **uids)
    assert "(9 such pairs)" in refusal(tmp_path)


def test_a_copy_that_is_compressed_is_a_copy(tmp_path):
    write_series(tmp_path / "a", stored_values(), SeriesInstanceUID="1.2.3", SOPInstanceUID="1.2.4")
    write_series(tmp_path / "b", stored_values(), SeriesInstanceUID="1.2.3", SOPInstanceUID="1.2.4", syntax=RLELossless)
    volume = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels, stored_values() - 1024)
    assert {Path(file).parent.name for file in volume.files} == {"a"}


# ---- empty identity ------------------------------------------------------------------------------------------------

BLANK = dict.fromkeys(("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"), "")


@pytest.mark.parametrize(
    "blank",
    [
        *(BLANK, BLANK | {"SeriesInstanceUID": None}, BLANK | {"SOPClassUID": ""}),
        *(dict.fromkeys(BLANK, text) for text in ("0", "anonymous")),
    ],
)
@pytest.mark.parametrize("shift", [0, SHAPE[2] * SPACING[2], 1.25])
def test_two_folders_without_uids_are_two_series(tmp_path, blank, shift):
    """At the same places, one where the other ends, or half a slice apart; some slices are equal (air)."""
    stored = [stored_values(seed=seed) for seed in (1, 2)]
    for name, values, far in zip("ab", stored, (0, shift), strict=True):
        values[:, :, 4] = 0
        place = (POSITION[0], POSITION[1], POSITION[2] + far)
        write_series(tmp_path / name, values, position=place, **blank)
    series, reasons = find_series(files_in(tmp_path))
    assert reasons == {} and [one.series_uid for one in series] == ["", ""]
    for one, values in zip(series, stored, strict=True):
        np.testing.assert_array_equal(read_series(one).voxels, values - 1024)


@pytest.mark.parametrize("keyword", ["PatientID", "PatientName"])
@pytest.mark.parametrize("shift", [0, SHAPE[2] * SPACING[2], 1.25])
def test_two_patients_in_one_folder_without_uids_are_two_series(tmp_path, keyword, shift):
    place = (POSITION[0], POSITION[1], POSITION[2] + shift)
    write_series(tmp_path, stored_values(seed=1), suffix=".1", **BLANK | {keyword: "1"})
    write_series(tmp_path, stored_values(seed=2), suffix=".2", position=place, **BLANK | {keyword: "2"})
    series, _ = find_series(files_in(tmp_path))
    assert sorted(sorted({Path(file).suffix for file in one.files}) for one in series) == [[".1"], [".2"]]


@pytest.mark.parametrize("keyword", ["PatientName", "StudyInstanceUID", "FrameOfReferenceUID"])
@pytest.mark.parametrize("shift", [0, SHAPE[2] * SPACING[2], 1.25])
def test_one_series_uid_in_two_folders_of_two_owners_is_two_series(tmp_path, keyword, shift):
    """Even if one begins where the other ends, or their slices lie half a step apart: one stack by positions."""
    for name, far in (("1", 0), ("2", shift)):
        place = (POSITION[0], POSITION[1], POSITION[2] + far)
        tags = {"SeriesInstanceUID": "1.2.3", "PatientID": "ANON", keyword: f"1.2.{name}"}
        write_series(tmp_path / name, stored_values(seed=int(name)), position=place, **tags)
    series, _ = find_series(files_in(tmp_path))
    assert [{Path(file).parent.name for file in one.files} for one in series] == [{"1"}, {"2"}]
    for one, seed in zip(series, (1, 2), strict=True):
        np.testing.assert_array_equal(read_series(one).voxels, stored_values(seed=seed) - 1024)


def test_a_series_in_two_folders_of_one_owner_is_one(tmp_path):
    stored = stored_values()
    files = write_series(tmp_path, stored)
    (tmp_path / "more").mkdir()
    for file in files[4:]:
        file.rename(tmp_path / "more" / file.name)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored - 1024)


@pytest.mark.parametrize("series_uid", ["", "1.2.3"])
def test_two_frames_of_reference_woven_in_a_folder_are_two_volumes(tmp_path, series_uid):
    """The slices alternate, and each half is even: DICOM gives positions of two frames nothing in common."""
    for seed in (0, 1):
        place = (*POSITION[:2], POSITION[2] + seed * SPACING[2] / 2)
        tags = {"SeriesInstanceUID": series_uid, "FrameOfReferenceUID": f"1.2.{seed}"}
        write_series(tmp_path, stored_values(seed=seed), position=place, suffix=f".{seed}", **tags)
    series, _ = find_series(files_in(tmp_path))
    for seed, one in enumerate(sorted(series, key=lambda one: Path(one.files[0]).suffix)):
        np.testing.assert_array_equal(read_series(one).voxels, stored_values(seed=seed) - 1024)
    assert len(series) == 2


def test_a_frame_of_reference_of_each_slice_splits_nothing(tmp_path):
    write_series(tmp_path, stored_values(), edit=lambda one, z: setattr(one, "FrameOfReferenceUID", f"1.2.{z}"))
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


@pytest.mark.parametrize(
    ("keyword", "value"), [("PatientName", lambda z: f"1.{z % 2}"), ("FrameOfReferenceUID", lambda z: f"1.{z // 3}")]
)
def test_owners_that_are_mixed_over_folders_are_refused(tmp_path, keyword, value):
    """Folder 1 has both, so they may be one volume that an anonymiser changed, or two; folder 2 speaks against it."""
    files = write_series(tmp_path / "1", stored_values(), edit=lambda one, z: setattr(one, keyword, value(z)))
    (tmp_path / "2").mkdir()
    files[8].rename(tmp_path / "2" / files[8].name)
    assert f"differ in {keyword}" in refusal(tmp_path)


def test_a_copy_within_a_folder_without_uids_counts_once(tmp_path):
    files = write_series(tmp_path, stored_values(), **BLANK)
    shutil.copy(files[4], tmp_path / "zz copy of it.dcm")
    assert read(tmp_path).files == tuple(map(str, files))


@pytest.mark.parametrize(("keyword", "phases"), [("AcquisitionTime", ("101010", "101030")), ("KVP", (80, 140))])
def test_slices_of_air_of_two_phases_are_no_copies(tmp_path, keyword, phases):
    for seed, phase in enumerate(phases):
        stored = stored_values(seed=seed)
        stored[:, :, 0] = 0
        tags = {"SeriesInstanceUID": "1.2.3", "SOPInstanceUID": "", keyword: phase}
        write_series(tmp_path, stored, suffix=f".{seed}", **tags)
    series, _ = find_series(files_in(tmp_path))
    assert [read_series(one).voxels.shape[2] for one in series] == [9, 9]


@pytest.mark.parametrize("uid", ["", "0"])
def test_slices_of_air_without_uid_are_no_copies(tmp_path, uid):
    """Dropped, the lowest slice of one of two volumes would be missing, and nothing would tell."""
    for seed in (1, 2):
        stored = stored_values(seed=seed)
        stored[:, :, 0] = 0
        write_series(tmp_path, stored, suffix=f".{seed}", SeriesInstanceUID="1.2.3", SOPInstanceUID=uid)
    assert "(9 such pairs)" in refusal(tmp_path)


def test_an_image_without_uid_beside_others_is_named(tmp_path):
    """It may be the last slice of the others: nothing else would tell."""

    def strip(dataset, z):
        if z == 8:
            dataset.SeriesInstanceUID = ""

    files = write_series(tmp_path, stored_values(), edit=strip)
    series, reasons = find_series(files_in(tmp_path))
    assert [len(one.files) for one in series] == [8] and list(reasons) == [str(files[8])]
    assert "no valid SeriesInstanceUID, unlike the other images in its folder" in reasons[str(files[8])]


@pytest.mark.parametrize(
    "keyword",
    "SOPClassUID SOPInstanceUID SeriesInstanceUID StudyInstanceUID FrameOfReferenceUID PatientID RescaleType "
    "ConversionType ImageType PhotometricInterpretation NumberOfFrames SliceThickness SeriesDescription "
    "AcquisitionNumber InstanceNumber SpecificCharacterSet".split(),
)
@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_element_is_as_good_as_none(tmp_path, keyword, empty):
    write_series(tmp_path, stored_values(), **{keyword: empty})
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"])
def test_bare_files_with_an_empty_element_are_dicom(tmp_path, keyword):
    for file in write_series(tmp_path, stored_values()):
        dataset = pydicom.dcmread(file)
        dataset.preamble = None
        del dataset.file_meta
        setattr(dataset, keyword, "")
        dataset.save_as(file, implicit_vr=True, little_endian=True)
        assert is_dicom(file)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


def test_a_value_of_a_wrong_form_is_a_reason(tmp_path):
    """Whatever pydicom raises."""
    write_series(tmp_path, stored_values(), SOPClassUID=["1.2", "1.3"])
    assert "not a CT image" in refusal(tmp_path)


def test_an_odd_number_of_an_image_is_no_damage(tmp_path):
    for file in write_series(tmp_path, stored_values(), AcquisitionNumber=77):
        content = file.read_bytes()
        assert content.count(b"IS\x02\x0077") == 1
        file.write_bytes(content.replace(b"IS\x02\x0077", b"IS\x02\x00.5"))
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


@pytest.mark.parametrize("shift", [0.0, 1.1])
@pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID"])
def test_patients_whose_series_have_one_uid_are_split(tmp_path, keyword, shift):
    """As some anonymisers leave them; their slices may lie at the same places, or between one another's."""
    uids = {"SeriesInstanceUID": generate_uid(), "SOPInstanceUID": generate_uid()}
    for name, slices in [("1", 9), ("2", 8)]:
        place = (POSITION[0], POSITION[1], POSITION[2] + shift * (name == "2"))
        tags = uids | {keyword: f"1.2.{name}"}
        write_series(tmp_path / name, stored_values((7, 6, slices)), position=place, **tags)
    series, _ = find_series(files_in(tmp_path))
    assert [read_series(one).voxels.shape[2] for one in series] == [9, 8]


@pytest.mark.parametrize("tags", [{"ImageType": ["DERIVED", "PRIMARY", "VOLUME", "NONE"]}, {"PatientID": "patient 8"}])
def test_enhanced_images_of_one_series_are_split(tmp_path, tags):
    """Their places lie within the frames, which are not read to find series."""
    uid = generate_uid()
    for name in ("1", "2"):
        arguments = {"slope": [1] * 9, "intercept": [0] * 9, "order": range(9)}
        file = write_enhanced(tmp_path / f"{name}.dcm", stored_values(seed=int(name)), **arguments)
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID = uid
        for keyword, value in tags.items() if name == "2" else ():
            setattr(dataset, keyword, value)
        dataset.save_as(file)
    series, _ = find_series(files_in(tmp_path))
    assert len(series) == 2
    for one, seed in zip(series, (1, 2), strict=True):
        np.testing.assert_array_equal(read_series(one).voxels, stored_values(seed=seed))


def test_a_slice_without_a_place_stays_with_the_others_and_is_named(tmp_path):
    def strip(dataset, z):
        if z == 8:
            del dataset.ImagePositionPatient
            dataset.ImageType = DERIVED

    files = write_series(tmp_path, stored_values(), edit=strip)
    assert f"{files[8].name} has no ImagePositionPatient" in refusal(tmp_path)


def test_cosines_that_differ_in_the_last_decimal_do_not_split(tmp_path):
    def shake(dataset, z):
        dataset.ImageOrientationPatient = [1, 0.000001 * z, 0, -0.000001 * z, 1, 0]

    write_series(tmp_path, stored_values(), edit=shake)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


def test_dicom_is_told_by_its_content(tmp_path):
    (file, *_) = write_series(tmp_path, stored_values(), suffix=".txt")
    (tmp_path / "fake.dcm").write_bytes(bytes(2000))
    (tmp_path / "short.dcm").write_bytes(b"\x08\x00")
    (tmp_path / "VERSION").write_bytes(b"\x08\x00xxxxxxxxxx" * 200)
    (tmp_path / "falling.dcm").write_bytes(b"\x08\x00\x16\x00\0\0\0\0\x08\x00\x05\x00" + bytes(2000))
    assert is_dicom(file) and is_dicom(str(file))
    for name in ("fake.dcm", "short.dcm", "VERSION", "falling.dcm", "absent.dcm", "."):
        assert not is_dicom(tmp_path / name)


def test_a_large_file_that_starts_like_dicom_is_told_from_its_first_bytes(tmp_path):
    file = tmp_path / "zeros"
    file.write_bytes(b"\x08\x00")
    os.truncate(file, 40_000_000)
    begun = time.process_time()
    assert not is_dicom(file) and "not a DICOM file" in find_series([file])[1][str(file)]
    assert time.process_time() - begun < 0.5


# ---- refusing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"Modality": "MR", "SOPClassUID": MRImageStorage}, ["MR", "only CT"]),
        ({"Modality": "PT"}, ["PT", "only CT"]),
        ({"Modality": "RTSTRUCT"}, ["RTSTRUCT", "only CT"]),
        ({"Modality": None}, ["missing", "only CT"]),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, ["localizer", "exclude it"]),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, ["Secondary Capture", "original series"]),
        ({"ConversionType": "WSD"}, ["converted image", "original series"]),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, ["colour", "PALETTE COLOR"]),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, ["colour", "RGB"]),
        ({"PhotometricInterpretation": "GREY"}, ["PhotometricInterpretation GREY", "export it again"]),
        ({"HighBit": 15, "BitsStored": 12}, ["HighBit 15 with BitsStored 12, not 11"]),
        ({"PixelRepresentation": None}, ["no PixelRepresentation", "export it again"]),
        ({"BitsStored": ""}, ["no BitsStored", "export it again"]),
        ({"RescaleIntercept": "nan"}, ["RescaleIntercept nan, which is not a number"]),
        ({"RescaleType": "MGML"}, ["MGML", "not in HU"]),
        ({"RescaleSlope": None}, ["no RescaleSlope"]),
        ({"RescaleIntercept": ""}, ["no RescaleIntercept"]),
        ({"RescaleSlope": 0}, ["RescaleSlope 0"]),
        ({"PixelSpacing": None}, ["no PixelSpacing"]),
        ({"PixelSpacing": [0, 0.5]}, ["PixelSpacing 0.5 x 0 mm"]),
        ({"ImagePositionPatient": None}, ["no ImagePositionPatient", ".dcm"]),
        ({"ImageOrientationPatient": None}, ["no ImageOrientationPatient", ".dcm"]),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, ["(1, 0, 0, 1, 0, 0)", "right angles"]),
        ({"ImageOrientationPatient": [1, 0, 0]}, ["ImageOrientationPatient", "[1.0, 0.0, 0.0]", "6 numbers"]),
    ],
)
def test_what_is_no_ct_volume_is_refused(tmp_path, tags, words):
    write_series(tmp_path, stored_values(), **tags)
    message = refusal(tmp_path)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("tags", "is_failure"),
    [
        ({"Modality": ["CT", "PT"]}, True),
        ({"SOPClassUID": "1.3.12.2.1107.5.99.1"}, True),
        ({"SOPClassUID": "1.3.12.2.1107.5.99.1", "ImagePositionPatient": None}, False),  # raw data of a vendor
        ({"SOPClassUID": SecondaryCaptureImageStorage}, False),
        ({"PhotometricInterpretation": "ybr_full"}, False),
        ({"PhotometricInterpretation": "GREY"}, True),
        ({"Modality": "PT"}, False),
    ],
)
def test_what_may_be_a_ct_is_a_failure(tmp_path, tags, is_failure):
    write_series(tmp_path, stored_values(), **tags)
    ((series,), _) = find_series(files_in(tmp_path))
    with pytest.raises(RefusedScan) as refused:
        read_series(series)
    assert isinstance(refused.value, NoScan) != is_failure


def test_the_modality_may_be_in_small_letters(tmp_path):
    write_series(tmp_path, stored_values(), Modality="ct ")
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": "monochrome2 "},
        {"PhotometricInterpretation": ""},
        {"SamplesPerPixel": None},
        {"RescaleType": "hu"},
        {"RescaleType": "Hounsfield Units"},
        {"HighBit": None},
    ],
)
def test_what_is_clear_in_spite_of_its_form_is_read(tmp_path, tags):
    write_series(tmp_path, stored_values(), **tags)
    np.testing.assert_array_equal(read(tmp_path).voxels, stored_values() - 1024)


def test_a_warning_of_pydicom_is_told_once_not_for_each_slice(tmp_path, caplog):
    dicom_headers._told.clear()
    write_series(tmp_path, stored_values(), PixelData=pixel_bytes(stored_values()[:, :, 0]) + b"\0" * 46)
    read(tmp_path)
    assert len([message for message in caplog.messages if "46 bytes of excess padding" in message]) == 1


@pytest.mark.filterwarnings("ignore:End of file")
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_truncated_pixels_are_refused(tmp_path, syntax):
    files = write_series(tmp_path, stored_values((32, 32, 9)), syntax=syntax)
    os.truncate(files[6], files[6].stat().st_size - 1000)
    message = refusal(tmp_path)
    assert files[6].name in message and "truncated" in message


def test_missing_pixels_are_refused(tmp_path):
    files = write_series(tmp_path, stored_values(), PixelData=None)
    assert f"the pixels of {files[0].name}" in refusal(tmp_path)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.94"])
def test_compressions_without_a_decoder_are_refused_by_name(tmp_path, syntax):
    for file in write_series(tmp_path, stored_values()):
        dataset = pydicom.dcmread(file)
        dataset.PixelData = encapsulate([b"moving picture"])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
        dataset.save_as(file)
    message = refusal(tmp_path)
    assert f".dcm ({UID(syntax).name}) is not supported" in message


def test_a_file_that_went_away_is_named(tmp_path):
    files = write_series(tmp_path, stored_values())
    (series,), _ = find_series(files)
    os.remove(files[2])
    with pytest.raises(RefusedScan, match=f"{files[2].name}: it cannot be opened"):
        read_series(series)
