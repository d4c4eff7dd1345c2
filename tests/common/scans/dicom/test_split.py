# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Volumes that one series mixes come apart; one volume whose tags change stays whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from bundles.common.errors import RefusedScan
from bundles.common.scans.dicom_series import find_series, read_series
from bundles.common.scans.search import find_candidates

from ..dicom_files import POSITION, STUDY_UID, write_series

UID = "1.2.3.4"
STEP = 2.5  # mm between the slices that `write_series` makes
DERIVED = ["DERIVED", "PRIMARY", "AXIAL"]


def values(seed: int, slices: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3000, size=(5, 4, slices))


def write(folder: Path, seed: int, *, shift: float = 0, slices: int = 8, **options) -> None:
    """Write one part of the series; ``shift`` in mm along its slices."""
    position = (POSITION[0], POSITION[1], POSITION[2] + shift)
    suffix = f".{seed}.dcm"  # all parts in one folder
    write_series(folder, values(seed, slices), position=position, suffix=suffix, SeriesInstanceUID=UID, **options)


def assert_volumes(folder: Path, *seeds: int, slices: int = 8) -> None:
    series, reasons = find_series(folder.iterdir())
    assert reasons == {} and len(series) == len(seeds)
    volumes = [read_series(one).voxels for one in series]
    for seed in seeds:
        assert sum(np.array_equal(voxels, values(seed, slices) - 1024) for voxels in volumes) == 1
    if len(seeds) > 1:
        names = {candidate.name for candidate in find_candidates(folder).candidates}
        assert len(names) == len(seeds)  # of their output files


@pytest.mark.parametrize("shift", [0, STEP / 2, STEP / 4, 1.1, 3 * STEP])
@pytest.mark.parametrize(
    ("keyword", "one", "other"),
    [
        ("AcquisitionNumber", 1, 2),
        ("ConvolutionKernel", "B30f", "B70f"),
        ("ConvolutionKernel", ["Br38", "2"], ["Br64", "2"]),
    ],
)
def test_acquisitions_and_kernels_are_volumes(tmp_path, keyword, one, other, shift):
    """Two passes over the same places, half a slice apart, or one that begins later."""
    write(tmp_path, 1, **{keyword: one})
    write(tmp_path, 2, shift=shift, **{keyword: other})
    assert_volumes(tmp_path, 1, 2)


@pytest.mark.parametrize("shift", [0, 1.1])
@pytest.mark.parametrize(
    ("keyword", "one", "other"),
    [
        ("ReconstructionDiameter", 360, 400),
        ("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL"], DERIVED),
        ("SeriesNumber", 3, 4),
        ("SliceThickness", 2.5, 5),
        ("KVP", 80, 140),
        ("TemporalPositionIdentifier", 1, 2),
        ("NominalPercentageOfCardiacPhase", 30, 70),
        ("AcquisitionTime", "101010", "101530"),
        ("ContrastBolusAgent", "", "Iomeron"),
    ],
)
def test_other_attributes_sort_slices_that_are_no_stack_together(tmp_path, keyword, one, other, shift):
    write(tmp_path, 1, **{keyword: one})
    write(tmp_path, 2, shift=shift, **{keyword: other})
    assert_volumes(tmp_path, 1, 2)


@pytest.mark.parametrize("keyword", ["ReconstructionDiameter", "ImageType", "SeriesNumber", "AcquisitionTime"])
def test_half_a_slice_apart_other_attributes_do_not_split(tmp_path, keyword, caplog):
    """They can change from slice to slice of one scan. But a warning names what alternates."""
    pair = {"ReconstructionDiameter": (1, 2), "ImageType": ("A", "B"), "SeriesNumber": (1, 2)}.get(keyword, ("1", "2"))
    pair = ("101010", "101011") if keyword == "AcquisitionTime" else pair
    for seed in (1, 2):
        write(tmp_path, seed, shift=(seed - 1) * STEP / 2, **{keyword: pair[seed - 1]})
    (series,), _ = find_series(tmp_path.iterdir())
    assert read_series(series).voxels.shape == (5, 4, 16)
    assert f"the slices of this series alternate between 2 values of {keyword}" in caplog.text


def test_two_acquisitions_with_two_kernels_are_four_volumes(tmp_path):
    for seed in range(4):
        write(tmp_path, seed, AcquisitionNumber=seed // 2, ConvolutionKernel=f"B{seed % 2}", shift=(seed // 2) * 0.8)
    assert_volumes(tmp_path, 0, 1, 2, 3)


def test_three_acquisitions_at_one_place_are_three_volumes(tmp_path):
    for seed in range(3):
        write(tmp_path, seed, AcquisitionNumber=seed)
    assert_volumes(tmp_path, 0, 1, 2)


@pytest.mark.parametrize("keyword", ["AcquisitionNumber", "ConvolutionKernel"])
def test_blocks_of_a_scan_stay_together(tmp_path, keyword):
    def number(dataset, z):
        setattr(dataset, keyword, str(z // 4))

    write(tmp_path, 1, slices=12, edit=number)
    assert_volumes(tmp_path, 1, slices=12)


def test_a_slice_that_lacks_between_blocks_is_not_hidden(tmp_path):
    """Each block alone would pass for a volume."""
    write(tmp_path, 1, AcquisitionNumber=1)
    write(tmp_path, 2, AcquisitionNumber=2, shift=9 * STEP)
    (series,), _ = find_series(tmp_path.iterdir())
    with pytest.raises(RefusedScan, match="lacks 1 of its slices"):
        read_series(series)


def test_blocks_of_different_spacing_are_two_volumes(tmp_path):
    write(tmp_path, 1, AcquisitionNumber=1)
    write(tmp_path, 2, AcquisitionNumber=2, shift=8 * STEP, spacing=(0.75, 0.5, 5))
    assert_volumes(tmp_path, 1, 2)


def test_an_acquisition_that_lacks_a_slice_is_not_split_off(tmp_path):
    """Nor is its partner used: the message names both."""
    write(tmp_path, 1, AcquisitionNumber=1)
    write(tmp_path, 2, AcquisitionNumber=2, offsets=[0, 2.5, 5, 10, 12.5, 15, 17.5, 20])
    (series,), _ = find_series(tmp_path.iterdir())
    with pytest.raises(RefusedScan, match=r"share a position.*\(7 such pairs\)"):
        read_series(series)


@pytest.mark.parametrize("period", [1, 2])
def test_a_number_that_changes_with_every_slice_or_two_splits_nothing(tmp_path, period):
    def number(dataset, z):
        dataset.AcquisitionNumber = z // period

    write(tmp_path, 1, edit=number)
    assert_volumes(tmp_path, 1)


def test_pairs_of_slices_are_no_volumes(tmp_path):
    for seed in (1, 2):
        write(tmp_path, seed, slices=2, AcquisitionNumber=seed)
    (series,), _ = find_series(tmp_path.iterdir())
    assert len(series.files) == 4


def own_series_of_each(dataset, z):
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = f"1.2.3.{z + 1}", f"1.2.4.{z + 1}"


def test_images_with_a_series_uid_each_are_one_volume_of_their_folder_and_patient(tmp_path, caplog):
    for patient in ("1", "2"):
        write_series(tmp_path / patient, values(int(patient)), PatientID=patient, edit=own_series_of_each)
    for patient in ("3", "4"):  # in one folder
        write_series(tmp_path / "3", values(int(patient)), PatientID=patient, suffix=patient, edit=own_series_of_each)
    series, refused = find_series(path for path in tmp_path.rglob("*") if path.is_file())
    assert [one.patient_id for one in series] == ["1", "2", "3", "4"] and not refused
    for seed, one in enumerate(series, 1):
        np.testing.assert_array_equal(read_series(one).voxels, values(seed) - 1024)
    assert f"{tmp_path / '1'}: 8 images have a SeriesInstanceUID of their own each" in caplog.text


def test_single_images_beside_a_series_are_not_joined(tmp_path):
    write_series(tmp_path, values(0))
    write_series(tmp_path, values(1), suffix=".ima", edit=own_series_of_each)
    for file in tmp_path.glob("*.ima"):  # of one study
        dataset = pydicom.dcmread(file)
        dataset.StudyInstanceUID = STUDY_UID
        dataset.save_as(file)
    series, _ = find_series(tmp_path.iterdir())
    assert sorted(len(one.files) for one in series) == [1] * 8 + [8]


def test_two_single_images_are_not_joined(tmp_path):
    write_series(tmp_path, values(0, 2), edit=own_series_of_each)
    assert len(find_series(tmp_path.iterdir())[0]) == 2
