# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A DICOM segmentation contains the label map on the grid of its series, with the identity of the patient."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from pydicom.uid import SegmentationStorage

from bundles.common.cases.failures import Failures
from bundles.common.errors import InputError, RefusedScan
from bundles.common.scans.dicom_series import DicomVolume, find_series, read_series
from bundles.segmentation.results.dicom_segmentation import ORGANS, SaveDicomSegmentations, write_dicom_segmentation

from ...common.scans.dicom_files import AXIAL, STUDY_UID, write_enhanced, write_series

SHAPE = (7, 6, 9)
OBLIQUE = (0.8, 0.36, 0.48, -0.6, 0.48, 0.64)
LABELS = {0: "background", 1: "spleen", 2: "right_kidney", 6: "liver", 10: "portal_and_splenic_veins", 14: "spare part"}
BTCV = (
    "spleen right_kidney left_kidney gallbladder esophagus liver stomach aorta inferior_vena_cava "
    "portal_and_splenic_veins pancreas right_adrenal_gland left_adrenal_gland"
).split()


def make_series(folder: Path, **options) -> DicomVolume:
    stored = np.random.default_rng(0).integers(0, 3000, size=SHAPE)
    write_series(folder, stored, **options)
    return volume_in(folder)


def volume_in(folder: Path) -> DicomVolume:
    (series,), _ = find_series(folder.iterdir())
    return read_series(series)


def organs(*values: int) -> np.ndarray:
    """A label map without any symmetry; the first and last slices are empty."""
    label_map = np.random.default_rng(1).choice([0, *values], size=SHAPE)
    label_map[:, :, [0, -1]] = 0
    return label_map.astype(np.uint8)


def save(path: Path, volume: DicomVolume, label_map: np.ndarray, labels=LABELS) -> pydicom.Dataset:
    write_dicom_segmentation(
        path, label_map=label_map, labels=labels, files=volume.files, model_name="swin_unetr_btcv", model_version="0.1"
    )
    return pydicom.dcmread(path)


def places_by_segment(segmentation: pydicom.Dataset) -> dict[str, dict[tuple, np.ndarray]]:
    """The non-empty planes (rows, columns) of each segment by their position, read element by element."""
    labels = {segment.SegmentNumber: segment.SegmentLabel for segment in segmentation.SegmentSequence}
    found: dict[str, dict[tuple, np.ndarray]] = {label: {} for label in labels.values()}
    frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for frame, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        holder = groups if "SegmentIdentificationSequence" in groups else shared
        label = labels[holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        found[label][tuple(map(float, groups.PlanePositionSequence[0].ImagePositionPatient))] = frame
    return found


def assert_holds(segmentation: pydicom.Dataset, volume: DicomVolume, label_map: np.ndarray) -> None:
    """Compare voxel by voxel: each plane by the position of its source in the volume's affine."""
    found = places_by_segment(segmentation)
    assert set(found) == {LABELS[value] for value in np.unique(label_map) if value}
    for value in np.unique(label_map[label_map > 0]):
        planes = found[LABELS[value]]
        for z in range(SHAPE[2]):
            right, back, up = (volume.affine @ [0, 0, z, 1])[:3]
            place = [key for key in planes if np.allclose(key, (-right, -back, up), rtol=0, atol=1e-6)]
            expected = label_map[:, :, z].T == value
            assert len(place) == expected.any()
            if place:
                np.testing.assert_array_equal(planes[place[0]], expected)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_the_organs_lie_where_the_label_map_has_them(tmp_path, orientation):
    volume = make_series(tmp_path / "ct", orientation=orientation)
    label_map = organs(1, 6, 2, 14)
    assert_holds(save(tmp_path / "seg.dcm", volume, label_map), volume, label_map)


def test_highdicom_reads_the_label_map_back(tmp_path):
    volume = make_series(tmp_path / "ct", orientation=OBLIQUE)
    label_map = organs(1, 6, 10)
    save(tmp_path / "seg.dcm", volume, label_map)
    segmentation = hd.seg.segread(tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in volume.files]
    read = segmentation.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    expected = np.select([label_map == 1, label_map == 6, label_map == 10], [1, 2, 3])
    np.testing.assert_array_equal(read.transpose(2, 1, 0), expected)


def test_every_frame_refers_to_the_image_that_it_lies_on(tmp_path):
    volume = make_series(tmp_path / "ct")
    segmentation = save(tmp_path / "seg.dcm", volume, organs(1, 6))
    positions = {
        source.SOPInstanceUID: source.ImagePositionPatient
        for source in (pydicom.dcmread(file) for file in volume.files)
    }
    assert segmentation.NumberOfFrames == 2 * (SHAPE[2] - 2)
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        assert positions[source.ReferencedSOPInstanceUID] == groups.PlanePositionSequence[0].ImagePositionPatient


def test_patient_and_study_are_those_of_the_series(tmp_path):
    volume = make_series(tmp_path / "ct", PatientBirthDate="19500203", StudyDate="20200102", AccessionNumber="A12")
    segmentation = save(tmp_path / "seg.dcm", volume, organs(1))
    source = pydicom.dcmread(volume.files[0])
    assert segmentation.SOPClassUID == SegmentationStorage and segmentation.Modality == "SEG"
    assert (segmentation.PatientID, segmentation.PatientName) == ("patient 7", "Doe^Jane")
    assert (segmentation.PatientBirthDate, segmentation.StudyDate) == ("19500203", "20200102")
    assert segmentation.AccessionNumber == "A12" and segmentation.StudyInstanceUID == STUDY_UID
    assert segmentation.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert segmentation.SeriesInstanceUID != source.SeriesInstanceUID
    assert segmentation.SoftwareVersions == "0.1" and segmentation.SegmentationType == "BINARY"


def test_segments_are_named_and_coded(tmp_path):
    volume = make_series(tmp_path / "ct")
    segments = save(tmp_path / "seg.dcm", volume, organs(1, 2, 14)).SegmentSequence
    assert [segment.SegmentLabel for segment in segments] == ["spleen", "right_kidney", "spare part"]
    assert [segment.SegmentNumber for segment in segments] == [1, 2, 3]
    types = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in segments]
    assert [kind.CodeMeaning for kind in types] == ["Spleen", "Kidney", "Anatomical Structure"]
    assert [kind.CodeValue for kind in types] == ["78961009", "64033007", "91723000"]
    sides = [kind.get("SegmentedPropertyTypeModifierCodeSequence") for kind in types]
    assert sides[0] is None and sides[1][0].CodeMeaning == "Right"
    for segment in segments:
        assert segment.SegmentAlgorithmType == "AUTOMATIC" and segment.SegmentAlgorithmName == "swin_unetr_btcv"
    assert len({tuple(segment.RecommendedDisplayCIELabValue) for segment in segments}) == 3


def test_all_organs_of_btcv_have_codes_of_their_own_and_sides(tmp_path):
    volume = make_series(tmp_path / "ct")
    labels = dict(enumerate(BTCV, 1))
    label_map = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 14
    segments = save(tmp_path / "seg.dcm", volume, label_map, labels).SegmentSequence
    assert [segment.SegmentLabel for segment in segments] == BTCV
    meanings = {}
    for segment in segments:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        side = kind.get("SegmentedPropertyTypeModifierCodeSequence")
        meanings[segment.SegmentLabel] = (side[0].CodeMeaning if side else "", kind.CodeMeaning)
    assert len(set(meanings.values())) == 13 and ("", "Anatomical Structure") not in meanings.values()
    assert meanings["left_adrenal_gland"] == ("Left", "Adrenal gland")
    assert meanings["inferior_vena_cava"] == ("", "Inferior vena cava")
    assert {name.removeprefix("right_").removeprefix("left_") for name in BTCV} == set(ORGANS)


@pytest.mark.parametrize("name", ["cancer", "tumour", "colon_cancer"])
def test_a_tumour_is_no_normal_anatomy(tmp_path, name):
    volume = make_series(tmp_path / "ct")
    (segment,) = save(tmp_path / "seg.dcm", volume, organs(1), {1: name}).SegmentSequence
    assert segment.SegmentLabel == name
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Morphologically Abnormal Structure"


def test_without_organs_no_file_is_left_and_the_log_says_so(tmp_path, caplog):
    volume = make_series(tmp_path / "ct")
    path = tmp_path / "out" / "seg.dcm"
    save(path, volume, organs(1))
    write_dicom_segmentation(
        path, label_map=np.zeros(SHAPE), labels=LABELS, files=volume.files, model_name="m", model_version="1"
    )
    assert list(path.parent.iterdir()) == []
    assert str(path) in caplog.text and "no organ" in caplog.text


def test_an_enhanced_source_is_referred_to_by_frame(tmp_path):
    stored = np.random.default_rng(0).integers(0, 3000, size=SHAPE)
    file = write_enhanced(
        tmp_path / "ct" / "volume.dcm", stored, slope=[1] * 9, intercept=[0] * 9, order=[3, 1, 2, 0, 4, 8, 7, 6, 5]
    )
    volume = volume_in(tmp_path / "ct")
    label_map = organs(1, 6)
    segmentation = save(tmp_path / "seg.dcm", volume, label_map)
    assert_holds(segmentation, volume, label_map)
    places = [
        groups.PlanePositionSequence[0].ImagePositionPatient
        for groups in pydicom.dcmread(file).PerFrameFunctionalGroupsSequence
    ]
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        assert places[source.ReferencedFrameNumber - 1] == groups.PlanePositionSequence[0].ImagePositionPatient


def test_sources_stripped_of_names_will_do(tmp_path):
    absent = "PatientID PatientName PatientBirthDate PatientSex AccessionNumber StudyID StudyDate StudyTime".split()
    absent += ["FrameOfReferenceUID", "ReferringPhysicianName"]
    volume = make_series(tmp_path / "ct", **dict.fromkeys(absent))
    label_map = organs(1, 6)
    segmentation = save(tmp_path / "seg.dcm", volume, label_map)
    assert not segmentation.PatientID and not segmentation.PatientName
    assert_holds(segmentation, volume, label_map)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyError("a"), MemoryError()])
def test_failure_in_the_middle_leaves_no_file_and_says_why(tmp_path, monkeypatch, error):
    """The file of an earlier run would belong to another label map."""
    volume = make_series(tmp_path / "ct")
    path = tmp_path / "out" / "seg.dcm"
    save(path, volume, organs(1))

    def fail(dataset, file, **_):
        Path(file).write_bytes(b"half a segmentation")
        raise error

    monkeypatch.setattr(hd.seg.Segmentation, "save_as", fail)
    with pytest.raises(RefusedScan, match=rf"cannot be written \({type(error).__name__}: "):
        save(path, volume, organs(1, 6))
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_map": np.ones((6, 7, 9), np.uint8)}, ["(6, 7, 9)", "(7, 6, 9)", "seg.dcm"]),
        ({"label_map": organs(1, 3)}, ["[3]", "seg.dcm", "'labels'"]),
        ({"files": "reversed"}, ["order", "seg.dcm"]),
    ],
)
def test_a_label_map_of_another_grid_is_refused(tmp_path, change, words):
    volume = make_series(tmp_path / "ct")
    if change.get("files"):
        change = {"files": volume.files[::-1]}
    arguments = {"label_map": organs(1), "files": volume.files} | change
    with pytest.raises(InputError) as refused:
        write_dicom_segmentation(tmp_path / "seg.dcm", labels=LABELS, model_name="m", model_version="1", **arguments)
    assert not (tmp_path / "seg.dcm").exists()
    for word in words:
        assert word in str(refused.value)


# ---- the handler ---------------------------------------------------------------------------------------------------


def evaluate(handler: SaveDicomSegmentations, *items: dict) -> None:
    """Run an evaluator that outputs these items."""

    def step(engine, batch):
        return list(items)

    engine = Engine(step)
    handler.attach(engine)
    engine.run([[{} for _ in items]])


def handler_of(tmp_path: Path, image: Path, volume: DicomVolume) -> SaveDicomSegmentations:
    labels = {str(value): name for value, name in LABELS.items()}  # as in JSON
    metadata = tmp_path / "metadata.json"
    metadata.write_text('{"name": "swin_unetr_btcv", "version": "0.1"}')
    return SaveDicomSegmentations({str(image): list(volume.files)}, labels, tmp_path / "out", str(metadata))


def prediction(label_map: np.ndarray, affine: np.ndarray, image: Path) -> MetaTensor:
    return MetaTensor(torch.from_numpy(label_map[None].copy()), affine=affine, meta={"filename_or_obj": str(image)})


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAL"])
def test_the_handler_writes_the_prediction_on_the_series(tmp_path, axes):
    """The organs are at the right position in the patient, whatever the orientation of the image file."""
    volume = make_series(tmp_path / "ct", orientation=OBLIQUE)
    image = tmp_path / "ct7.nii.gz"
    label_map = organs(1, 6)
    turned = nib.Nifti1Image(label_map, volume.affine)
    turned = turned.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt(axes))
    )
    item = {"pred": prediction(np.asarray(turned.dataobj), turned.affine, image)}
    evaluate(handler_of(tmp_path, image, volume), item)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["ct7_seg.dcm"]
    assert_holds(pydicom.dcmread(tmp_path / "out" / "ct7_seg.dcm"), volume, label_map)


def test_cases_of_other_images_are_left_alone(tmp_path, monkeypatch):
    volume = make_series(tmp_path / "ct")
    monkeypatch.chdir(tmp_path)
    handler = handler_of(tmp_path, Path("scans", "ct7.nii.gz"), volume)  # relative to the working folder
    evaluate(
        handler,
        {"pred": prediction(organs(1), volume.affine, tmp_path / "scans" / "ct8.nii.gz")},
        {"pred": prediction(organs(1), volume.affine, tmp_path / "scans" / "ct7.nii.gz")},
    )
    assert os.listdir(tmp_path / "out") == ["ct7_seg.dcm"]


def test_a_case_that_cannot_be_written_costs_no_other(tmp_path, caplog):
    """A label map beside its series, a series that went away, and one that is right."""
    images = [tmp_path / f"ct{number}.nii.gz" for number in (7, 8, 9)]
    volumes = [make_series(tmp_path / image.name) for image in images]
    handler = handler_of(tmp_path, images[0], volumes[0])
    handler.series = {str(image): list(volume.files) for image, volume in zip(images, volumes, strict=True)}
    moved = volumes[0].affine.copy()
    moved[2, 3] += 2.5
    os.remove(volumes[1].files[4])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ct7_seg.dcm").touch()  # of an earlier run
    affines = [moved, volumes[1].affine, volumes[2].affine]
    handler.failures = Failures(tmp_path)
    evaluate(handler, *({"pred": prediction(organs(1), *one)} for one in zip(affines, images, strict=True)))
    assert os.listdir(tmp_path / "out") == ["ct9_seg.dcm"]
    displaced, gone = handler.failures.all()
    assert [one.scan for one in (displaced, gone)] == [str(image) for image in images[:2]]
    assert "the label map is displaced by 2.5 mm" in displaced.reason and displaced.missing == "DICOM SEG"
    assert f"{Path(volumes[1].files[4]).name}: it cannot be opened" in gone.reason
    assert f"{images[0]} has no DICOM SEG: the label map is displaced" in caplog.text


def test_a_missing_prediction_is_named(tmp_path):
    volume = make_series(tmp_path / "ct")
    image = tmp_path / "ct7.nii.gz"
    item = {"image": prediction(organs(1), volume.affine, image)}
    with pytest.raises(InputError, match=r"ct7\.nii\.gz has no label map 'pred', only \['image'\]"):
        evaluate(handler_of(tmp_path, image, volume), item)


def test_an_empty_prediction_only_logs(tmp_path, caplog):
    volume = make_series(tmp_path / "ct")
    image = tmp_path / "ct7.nii.gz"
    with caplog.at_level(logging.WARNING):
        evaluate(handler_of(tmp_path, image, volume), {"pred": prediction(organs(), volume.affine, image)})
    assert "ct7_seg.dcm" in caplog.text and not (tmp_path / "out" / "ct7_seg.dcm").exists()
