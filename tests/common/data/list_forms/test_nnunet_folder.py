# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""nnU-Net's raw folders are read without a list of our own; what cannot be meant is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundles.common.data.data_list import data_list_ignore_label, data_list_labels, inference_scans, segmentation_scans
from bundles.common.data.list_forms.list_file import parse_data_list
from bundles.common.errors import InputError

CONTENT = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": "2", "ignore": 3},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def raw(folder: Path, *files: str, **changes) -> Path:
    for file in files or ("imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_a_raw_folder_is_a_data_list(tmp_path, caplog):
    folder = raw(tmp_path)
    raw(folder, "imagesTr/c_0000.nii.gz", "labelsTr/d.nii.gz", "imagesTs/t_0000.nii.gz")
    scans = segmentation_scans(folder, section="training", fold="all")
    assert [(Path(scan["image"]).name, Path(scan["label"]).name) for scan in scans] == [
        ("a_0000.nii.gz", "a.nii.gz"),
        ("b_0000.nii.gz", "b.nii.gz"),
    ]
    content = parse_data_list(folder / "dataset.json")
    assert [Path(scan["image"]).name for scan in content["unlabelled"]] == ["c_0000.nii.gz"]
    assert data_list_labels(folder) == {0: "background", 1: "liver", 2: "spleen"}
    assert data_list_ignore_label(folder) == 3 and content["modality"] == {"0": "CT"}
    assert [Path(scan["image"]).name for scan in inference_scans(folder)] == ["t_0000.nii.gz"]
    assert "1 image has no mask, such as c_0000" in caplog.text and "1 mask has no image" in caplog.text
    assert "numTraining" not in caplog.text


def test_labels_of_version_1_are_names_by_value(tmp_path):
    folder = raw(tmp_path, labels={"0": "background", "1": "liver", "2": "ignore"})
    assert data_list_labels(folder) == {0: "background", 1: "liver"} and data_list_ignore_label(folder) == 2


def test_channels_are_files_in_order_and_names_may_look_like_channels(tmp_path):
    cases = ("liver", "liver_0000")
    files = [f"imagesTr/{case}_{channel:04d}.nii.gz" for case in cases for channel in (1, 0)]
    folder = raw(
        tmp_path, *files, *(f"labelsTr/{case}.nii.gz" for case in cases), channel_names={"0": "T2", "1": "ADC"}
    )
    scans = segmentation_scans(folder, section="training", fold="all")
    assert [([Path(file).name for file in scan["image"]], Path(scan["label"]).name) for scan in scans] == [
        ([f"{case}_0000.nii.gz", f"{case}_0001.nii.gz"], f"{case}.nii.gz") for case in cases
    ]


def test_files_named_one_by_one_are_taken(tmp_path):
    dataset = {"a": {"images": ["ct/a.nii.gz"], "label": "seg/a.nii.gz"}, "b": {"images": ["ct/b.nii.gz"]}}
    folder = raw(tmp_path, "ct/a.nii.gz", "seg/a.nii.gz", dataset=dataset, numTraining=None)
    (scan,) = segmentation_scans(folder, section="training", fold="all")
    assert scan == {"image": str(folder / "ct/a.nii.gz"), "label": str(folder / "seg/a.nii.gz")}


def test_names_of_version_1_without_channels_are_completed(tmp_path):
    files = ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTs/t_0000.nii.gz", "labelsTr/a.nii.gz")
    folder = raw(tmp_path, *files)
    content = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "x"}}
    content |= {
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTs/t.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    (scan,) = segmentation_scans(folder, section="training", fold="all")
    assert [Path(file).name for file in scan["image"]] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert [Path(scan["image"]).name for scan in inference_scans(folder)] == ["t_0000.nii.gz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, r"regions \(whole\)"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "the label 'b' has the value 1"),
        ({"labels": {"background": 0, "a": 1.5}}, "the label 'a' has the value 1.5"),
        ({"labels": {"background": 0, "a": True}}, "the label 'a' has the value True"),
        ({"labels": None}, "'labels' must give names and values"),
        ({"file_ending": ".mha"}, "'file_ending' is '.mha'. Only NIfTI"),
        ({"channel_names": {"1": "CT"}}, "'channel_names' must name each channel by its number"),
        ({"channel_names": ["CT"]}, "'channel_names' must name each channel"),
        ({"channel_names": {"0": "T1", "1": "T2"}}, "the case 'a' has the channel.* 0000, but 'channel_names' names 2"),
        ({"dataset": {"a": {"label": "x.nii.gz"}}}, "the case 'a' of 'dataset' needs 'images'"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        parse_data_list(raw(tmp_path, **changes) / "dataset.json")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["imagesTr/a.nii.gz", "labelsTr/a.nii.gz"], r"imagesTr/a\.nii\.gz is no channel of a case"),
        (["imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nii", "labelsTr/a.nii.gz"], "are the same channel"),
        (["imagesTr/a_0000.nii.gz"], r"1 image \(a_0000.nii.gz\) and 0 masks"),
        (["imagesTr/a_0000.nii.gz", "labelsTr/b.nii.gz"], "none belong together by name"),
    ],
)
def test_files_that_do_not_match_are_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        parse_data_list(raw(tmp_path, *files) / "dataset.json")


def test_another_number_of_cases_than_stated_is_told(tmp_path, caplog):
    parse_data_list(raw(tmp_path, numTraining=7) / "dataset.json")
    assert "'numTraining' is 7, but 2 cases have image and label" in caplog.text


def test_validation_folders_are_the_validation_section(tmp_path):
    pair = ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    folder = raw(
        tmp_path, *pair, "imagesVal/b_0000.nii.gz", "labelsVal/b.nii.gz", "imagesVal/c_0000.nii.gz", numTraining=1
    )
    (scan,) = segmentation_scans(folder, section="validation", fold=None)
    assert [Path(scan[key]).name for key in ("image", "label")] == ["b_0000.nii.gz", "b.nii.gz"]
    content = parse_data_list(folder / "dataset.json")
    assert len(content["training"]) == 1
    assert [Path(scan["image"]).name for scan in content["unlabelled"]] == ["c_0000.nii.gz"]
