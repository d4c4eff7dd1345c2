# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""An entry names the structures that its label shows; wrong names are refused with the entry."""

from __future__ import annotations

import json

import pytest

from bundles.common.data.carried_labels import cases_record
from bundles.common.data.data_list import label_as_reference, segmentation_scans
from bundles.common.data.partial_labels import refuse_partial, shown_classes
from bundles.common.errors import InputError

LABELS = {"0": "background", "1": "liver", "2": "left kidney", "3": "aorta"}


def listed(tmp_path, *, labels=LABELS, own=None, **note):
    for name in ("a", "b"):
        (tmp_path / f"{name}.nii.gz").touch()
        (tmp_path / f"{name}_label.nii.gz").touch()
    entries = [{"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz"} for name in ("a", "b")]
    entries[1] |= note
    content = {"training": entries} | ({"labels": own} if own else {})
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return segmentation_scans(tmp_path, section="training", fold="all", labels=labels)


@pytest.mark.parametrize(
    ("named", "values"),
    [
        (["liver"], [1]),
        (["aorta", "Left_Kidney"], [2, 3]),
        ([3, 1], [1, 3]),
        (["2", "liver", 1, 0], [1, 2]),
        (["background", "aorta"], [3]),
        (["Leber"], [1]),  # a name of the list itself
    ],
)
def test_names_and_values_become_sorted_values(tmp_path, named, values):
    whole, partial = listed(tmp_path, own={"0": "background", "1": "Leber"}, labelled=named)
    assert "labelled" not in whole and partial["labelled"] == values


def test_an_entry_that_names_all_structures_is_an_ordinary_one(tmp_path):
    assert [set(entry) for entry in listed(tmp_path, labelled=[3, 2, "liver"])] == [{"image", "label"}] * 2


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([], r"training\[1\] has labelled \[\]: it must be a list"),
        ("liver", r"training\[1\] has labelled 'liver': it must be a list"),
        (None, r"training\[1\] has labelled None"),
        ([True], r"training\[1\] has labelled \[True\]"),
        ([["liver"]], r"training\[1\] has labelled"),
        (["spleen"], r"b\.nii\.gz has labelled \['spleen'\], but 'spleen' is none of the labels"),
        ([4], r"b\.nii\.gz has labelled \[4\], but 4 is none of the labels"),
        ([-1], r"but -1 is none of the labels"),
        (["7"], r"but '7' is none of the labels"),
        (["background"], r"names no structure beside the background"),
    ],
)
def test_what_names_no_structure_is_refused_with_the_entry(tmp_path, named, message):
    with pytest.raises(InputError, match=message):
        listed(tmp_path, labelled=named)


def test_the_background_is_always_shown():
    assert shown_classes({"labelled": [2]}, classes=4).tolist() == [True, False, True, False]
    assert shown_classes({}, classes=3).all()


def test_where_the_rest_would_be_taken_for_background_partial_labels_are_refused(tmp_path):
    entries = listed(tmp_path, labelled=["liver"])
    with pytest.raises(
        InputError,
        match=r"The probe needs labels that show all.* 1 case is labelled in part, .*b\.nii\.gz, which shows 1",
    ):
        refuse_partial(entries, where="The probe")
    refuse_partial(entries[:1], where="The probe")


def test_scores_and_the_record_of_a_run_know_of_partial_labels(tmp_path):
    entries = listed(tmp_path, labelled=["liver"])
    assert [item.get("labelled") for item in label_as_reference(entries)] == [None, [1]]
    assert cases_record(entries)["sha256"] not in (None, cases_record([{}, {"labelled": [2]}])["sha256"])
    assert cases_record(entries[:1]) == {"real": 1, "carried": 0, "sha256": None}
