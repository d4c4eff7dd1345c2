# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundles.common.data.data_list import data_list_labels, inference_scans, segmentation_scans
from bundles.common.data.labelled_folder import folder_data_list
from bundles.common.errors import InputError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


LAYOUTS = [
    ("imagesTr", "labelsTr", "imagesTs"),
    ("RawData/Training/img", "RawData/Training/label", "RawData/Testing/img"),
    ("Training/img", "Training/label", "Testing/img"),
    ("img", "label", "imgTs"),
]


@pytest.mark.parametrize(("images", "labels", "test"), LAYOUTS)
def test_each_layout_pairs_image_and_label_by_number(tmp_path, images, labels, test):
    numbers = ["0001", "0002", "0010"]
    touch(tmp_path, *[f"{images}/img{n}.nii.gz" for n in numbers], *[f"{labels}/label{n}.nii.gz" for n in numbers])
    touch(tmp_path, f"{test}/img0061.nii.gz", f"{images}/.DS_Store.nii.gz")
    content = folder_data_list(tmp_path)
    assert [entry["image"] for entry in content["training"]] == [f"{images}/img{n}.nii.gz" for n in numbers]
    assert [entry["label"] for entry in content["training"]] == [f"{labels}/label{n}.nii.gz" for n in numbers]
    assert content["test"] == [f"{test}/img0061.nii.gz"]


def test_files_of_one_name_are_a_pair_too(tmp_path):
    touch(tmp_path, "imagesTr/spleen_2_0000.nii.gz", "labelsTr/spleen_2.nii.gz", "imagesTr/a b.nii", "labelsTr/a b.nii")
    pairs = [(entry["image"], entry["label"]) for entry in folder_data_list(tmp_path)["training"]]
    assert pairs == [
        ("imagesTr/a b.nii", "labelsTr/a b.nii"),
        ("imagesTr/spleen_2_0000.nii.gz", "labelsTr/spleen_2.nii.gz"),
    ]


def test_files_without_partner_are_named(tmp_path, caplog):
    touch(tmp_path, "img/img0001.nii.gz", "img/img0002.nii.gz", "label/label0001.nii.gz", "label/label0003.nii.gz")
    content = folder_data_list(tmp_path)
    assert len(content["training"]) == 1 and content["unlabelled"] == ["img/img0002.nii.gz"]
    assert "1 image(s) have no mask, such as img0002.nii.gz: they are listed as unlabelled" in caplog.text
    assert "1 mask(s) have no image, such as" in caplog.text and "label0003.nii.gz: they are left out" in caplog.text


def test_two_files_of_one_case_are_refused(tmp_path):
    touch(tmp_path, "img/img0001.nii.gz", "img/img0001.nii", "label/label0001.nii.gz")
    with pytest.raises(InputError, match=r"img0001\.nii.* both case '0001'"):
        folder_data_list(tmp_path)


def test_another_folder_has_no_such_list(tmp_path):
    touch(tmp_path, "scans/a.nii.gz")
    assert folder_data_list(tmp_path) is None
    with pytest.raises(InputError, match="have the layout of BTCV"):
        segmentation_scans(tmp_path, section="training")


def test_five_folds_of_the_download_hold_out_every_case_once(tmp_path):
    numbers = [f"{number:04d}" for number in range(1, 31)]
    folder = touch(
        tmp_path,
        *[f"RawData/Training/img/img{n}.nii.gz" for n in numbers],
        *[f"RawData/Training/label/label{n}.nii.gz" for n in numbers],
        "RawData/Testing/img/img0061.nii.gz",
    )
    held_out = []
    for fold in range(5):
        training = segmentation_scans(folder, section="training", fold=fold)
        validation = segmentation_scans(folder, section="validation", fold=fold)
        assert (len(training), len(validation)) == (24, 6)
        assert not {scan["image"] for scan in training} & {scan["image"] for scan in validation}
        held_out += [Path(scan["image"]).name for scan in validation]
    assert sorted(held_out) == [f"img{n}.nii.gz" for n in numbers]
    assert data_list_labels(folder) == {}  # the bundle's own are meant


def test_a_list_wins_over_the_folders_and_the_official_24_6_list_is_read_as_it_is(tmp_path):
    numbers = [f"{number:04d}" for number in range(1, 31)]
    folder = touch(
        tmp_path,
        *[f"imagesTr/img{n}.nii.gz" for n in numbers],
        *[f"labelsTr/label{n}.nii.gz" for n in numbers],
        "imagesTs/img0061.nii.gz",
    )
    entries = [{"image": f"imagesTr/img{n}.nii.gz", "label": f"labelsTr/label{n}.nii.gz"} for n in numbers]
    content = {"labels": {"0": "background", "1": "spleen"}, "modality": {"0": "CT"}, "numTraining": 24}
    content |= {"training": entries[:24], "validation": entries[24:], "test": ["imagesTs/img0061.nii.gz"]}
    (folder / "dataset_0.json").write_text(json.dumps(content))
    validation = segmentation_scans(folder, data_list="dataset_0.json", section="validation", fold=None)
    assert [Path(scan["image"]).name for scan in validation] == [f"img{n}.nii.gz" for n in numbers[24:]]
    assert len(segmentation_scans(folder, data_list="dataset_0.json", section="training", fold=None)) == 24
    (tested,) = inference_scans(folder / "dataset_0.json")
    assert tested["image"].endswith("imagesTs/img0061.nii.gz")
