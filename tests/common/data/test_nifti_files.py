# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Names are judged by whole words, and suffixes in any case."""

from __future__ import annotations

import pytest

from bundles.common.data.case_names import case_name, case_names
from bundles.common.data.nifti_files import is_mask_folder, words


@pytest.mark.parametrize(
    "name",
    [
        "labelsTr",
        "labels",
        "Label",
        "LABELS",
        "seg",
        "SEG-2",
        "seg_ct",
        "segmentations",
        "Segmentation 3",
        "mask",
        "masks.old",
    ]
    + ["labelsTs", "labelsVa", "masksTr", "mask01", "_labels"],
)
def test_folders_of_masks(name):
    assert is_mask_folder(name)


@pytest.mark.parametrize(
    "name",
    [
        "labelled",
        "labeled_ct",
        "Labelling",
        "Segeberg",
        "segmented",
        "Segmenté",
        "maskenball",
        "Maskat",
        "unlabelled",
        "ct_masks",
    ]
    + ["imagesTr", "s0001", "labor", "segment", "7", "", "...", "Ségur"],
)
def test_folders_that_only_begin_alike_or_name_masks_later(name):
    assert not is_mask_folder(name)


def test_words_end_at_signs_digits_and_capitals():
    assert words("labelsTr_2-Ålesund.CT7") == ["labels", "tr", "2", "ålesund", "ct", "7"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII", ".NII.GZ", ".Nii.Gz", ".nii.GZ"])
def test_a_suffix_in_any_case_is_no_part_of_the_name(suffix):
    assert case_name(f"/data/SCAN.v2{suffix}") == "SCAN.v2"
    assert case_names([f"/d/s01/ct{suffix}", "/d/s02/ct.nii.gz"]) == {
        f"/d/s01/ct{suffix}": "s01/ct",
        "/d/s02/ct.nii.gz": "s02/ct",
    }
