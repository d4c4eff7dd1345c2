# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A data list is read as it was written, or refused with its file and place."""

from __future__ import annotations

import json

import pytest

from bundles.common.data.data_list import data_list_labels, inference_scans, segmentation_scans
from bundles.common.data.list_forms.list_file import parse_data_list
from bundles.common.errors import InputError
from tests.common.data.written_lists import entry, split, touch, write_list


@pytest.mark.parametrize("nobody", [None, "", "  ", "None", "nan", "NULL", "N/A", float("nan")])
def test_a_patient_that_says_nothing_is_no_patient(tmp_path, nobody):
    path = write_list(tmp_path, training=[entry(f"c{i}", patient=nobody) for i in range(4)])
    assert all("patient" not in scan for scan in parse_data_list(path)["training"])
    training, validation = split(tmp_path, folds=4)
    assert (len(training), len(validation)) == (3, 1)  # pooled, they could not be split


@pytest.mark.parametrize(
    ("patient", "text"), [(7, "7"), ("007", "007"), (7.0, "7"), (7.5, "7.5"), (" A 1 ", "A 1"), (0, "0")]
)
def test_a_patient_is_text(tmp_path, patient, text):
    path = write_list(tmp_path, training=[entry("a", patient=patient)])
    assert parse_data_list(path)["training"][0]["patient"] == text


@pytest.mark.parametrize("patient", [True, ["a"], {"id": 1}])
def test_a_patient_of_another_kind_is_refused(tmp_path, patient):
    path = write_list(tmp_path, training=[entry("a", patient=patient)])
    with pytest.raises(InputError, match=r"training\[0\] has the patient .*: it must be text or a number"):
        parse_data_list(path)


def test_the_msd_form_is_read_with_absolute_paths_and_the_keys_of_an_entry_are_kept(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    path = write_list(
        tmp_path,
        labels={"0": "background", "1": "spleen"},
        numTraining=2,
        training=[entry("x", fold=3, patient="p1"), {"image": ["a.nii.gz", "b.nii.gz"]}],
        test=["./imagesTs/t.nii.gz"],
    )
    content = parse_data_list(path)
    assert content["training"][0] == {
        "image": str(tmp_path / "imagesTr/x.nii.gz"),
        "label": str(tmp_path / "labelsTr/x.nii.gz"),
        "fold": 3,
        "patient": "p1",
    }
    assert content["training"][1] == {"image": [str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")]}
    assert content["test"] == [{"image": str(tmp_path / "imagesTs/t.nii.gz")}]
    assert content["numTraining"] == 2
    assert data_list_labels(tmp_path) == {0: "background", 1: "spleen"}


def test_a_missing_list_is_named_and_its_folder_is_listed(tmp_path):
    touch(tmp_path, "dataset_0.json", "scan.nii.gz")
    with pytest.raises(InputError, match=r"dataset\.json not found.*dataset_0\.json, scan\.nii\.gz"):
        parse_data_list(tmp_path / "dataset.json")
    with pytest.raises(InputError, match=r"folder .*nowhere does not exist"):
        parse_data_list(tmp_path / "nowhere" / "dataset.json")


def test_broken_json_is_named_with_line_and_column(tmp_path):
    (tmp_path / "dataset.json").write_text('{"training": [\n  {"image" "a"}]}')
    with pytest.raises(InputError, match=r"dataset\.json is not valid JSON: line 2, column 12"):
        parse_data_list(tmp_path / "dataset.json")
    (tmp_path / "dataset.json").write_bytes(b"\x1f\x8b\x08\xff")
    with pytest.raises(InputError, match="not UTF-8 text"):
        parse_data_list(tmp_path / "dataset.json")


@pytest.mark.parametrize("content", [{"train": [{"image": "a"}]}, {"training": []}, [1, 2]])
def test_a_list_without_scans_says_which_sections_it_looked_for(tmp_path, content):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"has no scans: none of its sections training, validation"):
        parse_data_list(tmp_path / "dataset.json")


@pytest.mark.parametrize("bad", [{"label": "l.nii.gz"}, {"image": ""}, {"image": []}, {"image": ["a", 3]}, 7])
def test_an_entry_without_image_is_shown_with_its_place(tmp_path, bad):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": ["a.nii.gz", bad]}))
    with pytest.raises(InputError, match=r"training\[1\] has no usable 'image'"):
        parse_data_list(tmp_path / "dataset.json")


def test_labels_that_are_no_numbers_are_refused_and_absent_ones_are_empty(tmp_path):
    write_list(tmp_path, training=["a.nii.gz"])
    assert data_list_labels(tmp_path) == {}
    write_list(tmp_path, training=["a.nii.gz"], labels={"background": 0})
    with pytest.raises(InputError, match="'labels' must map label values to names"):
        data_list_labels(tmp_path)


def test_notes_of_an_entry_are_kept_and_checked(tmp_path):
    path = write_list(tmp_path, training=[entry("a", weight=0.5, carried=True), entry("b")])
    first, second = segmentation_scans(tmp_path, section="training", fold="all")
    assert (first["weight"], first["carried"]) == (0.5, True) and second.keys() == {"image", "label"}
    write_list(tmp_path, training=[entry("a"), entry("b", weight=0)])
    with pytest.raises(InputError, match=rf"{path}: training\[1\] has the weight 0:"):
        parse_data_list(path)
    write_list(
        tmp_path, training=[entry("a", carried=True, carried_from=["imagesTr/b.nii.gz"]), entry("b", carried_from="a")]
    )
    with pytest.raises(InputError, match=r"training\[1\] has carried_from 'a': it must list the images"):
        parse_data_list(path)
    write_list(tmp_path, training=[entry("a", carried=True, carried_from=["imagesTr/b.nii.gz"])])
    assert parse_data_list(path)["training"][0]["carried_from"] == [str(tmp_path / "imagesTr/b.nii.gz")]


def test_brackets_without_end_are_refused(tmp_path):
    (tmp_path / "dataset.json").write_text('{"training": ' + "[" * 200_000)
    with pytest.raises(InputError, match=r"dataset\.json is not a JSON data list: its brackets are nested too deeply"):
        parse_data_list(tmp_path / "dataset.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"training": [{"image": "b\\u0000.nii.gz"}]}', "cannot be the path of a file"),
        ('{"training": [{"image": "b.nii.gz", "label": "b\\u0000.nii.gz"}]}', "cannot be the path of a file"),
        ('{"training": [{"image": "\\ud800.nii.gz"}]}', "cannot be the path of a file"),
        ('{"training": [{"image": "b.nii.gz", "weight": ' + "9" * 5000 + "}]}", "is not a JSON data list"),
    ],
)
def test_what_no_file_can_be_named_or_no_number_be_is_refused(tmp_path, text, words):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=words):
        parse_data_list(tmp_path / "dataset.json")


def test_paths_that_were_written_on_windows_are_found(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    for name in ("a.nii.gz", "b\\c.nii.gz"):  # the second is one name here
        (tmp_path / "imagesTr" / name).touch()
    images = [".\\imagesTr\\a.nii.gz", "imagesTr/b\\c.nii.gz"]
    (tmp_path / "dataset.json").write_text(json.dumps({"test": images}))
    found = [scan["image"] for scan in inference_scans(tmp_path / "dataset.json")]
    assert found == [str(tmp_path / "imagesTr" / name) for name in ("a.nii.gz", "b\\c.nii.gz")]
