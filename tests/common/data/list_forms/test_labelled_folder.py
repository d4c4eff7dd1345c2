# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundles.common.data.data_list import data_list_labels, inference_scans, segmentation_scans
from bundles.common.data.list_forms.labelled_folder import folder_data_list
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
    ("TrainingImg", "TrainingMask", "imagesTs"),
    ("train_images", "train_labels", "imagesTs"),
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
    assert "1 image has no mask, such as img0002.nii.gz: listed as unlabelled" in caplog.text
    assert "1 mask has no image, such as" in caplog.text and "label0003.nii.gz: left out" in caplog.text


def test_two_files_of_one_case_are_refused(tmp_path):
    touch(tmp_path, "img/img0001.nii.gz", "img/img0001.nii", "label/label0001.nii.gz")
    with pytest.raises(InputError, match=r"img0001\.nii.* both case '0001'"):
        folder_data_list(tmp_path)


def test_another_folder_has_no_such_list(tmp_path):
    touch(tmp_path, "scans/a.nii.gz")
    assert folder_data_list(tmp_path) is None
    with pytest.raises(InputError, match="without a list are known by their names: imagesTr"):
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


# ---- any folder with images and masks ----

FOLDERS = {
    "images and labels": (
        ["images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz"],
        [("images/a.nii.gz", "labels/a.nii.gz"), ("images/b.nii.gz", "labels/b.nii.gz")],
        [],
    ),
    "images and masks, with suffixes of their own": (
        ["Images/a_ct.nii.gz", "Images/b_ct.nii", "masksTr/a_mask.nii.gz", "masksTr/b-seg.nii.gz", "labelsTs/c.nii.gz"],
        [("Images/a_ct.nii.gz", "masksTr/a_mask.nii.gz"), ("Images/b_ct.nii", "masksTr/b-seg.nii.gz")],
        [],
    ),
    "suffixes in capitals": (
        ["imagesTr/A.NII.GZ", "labelsTr/A.nii.gz"],
        [("imagesTr/A.NII.GZ", "labelsTr/A.nii.gz")],
        [],
    ),
    "numbers that are no channels": (
        ["imagesTr/p_0000.nii.gz", "imagesTr/p_0001.nii.gz", "imagesTr/p_0002.nii.gz"]
        + ["labelsTr/p_0000.nii.gz", "labelsTr/p_0001.nii.gz"],
        [(f"imagesTr/p_000{n}.nii.gz", f"labelsTr/p_000{n}.nii.gz") for n in (0, 1)],
        ["imagesTr/p_0002.nii.gz"],
    ),
    "channels": (
        [f"imagesTr/p{case}_000{n}.nii.gz" for case in (1, 2) for n in (0, 1)] + ["labelsTr/p1.nii.gz"],
        [(["imagesTr/p1_0000.nii.gz", "imagesTr/p1_0001.nii.gz"], "labelsTr/p1.nii.gz")],
        [{"image": ["imagesTr/p2_0000.nii.gz", "imagesTr/p2_0001.nii.gz"]}],
    ),
    "one folder for each case": (
        ["s1/ct.nii.gz", "s1/label.nii.gz", "s2/CT.nii.gz", "s2/Segmentation.nii", "s3/ct.nii.gz", "labels/x.nii.gz"],
        [("s1/ct.nii.gz", "s1/label.nii.gz"), ("s2/CT.nii.gz", "s2/Segmentation.nii")],
        ["s3/ct.nii.gz"],
    ),
    "one folder for each case, with its name in the files": (
        ["p1/p1_imaging.nii.gz", "p1/p1_seg.nii.gz", "p2/p2_0000.nii.gz", "p2/p2_0001.nii.gz", "p2/p2_mask.nii.gz"],
        [
            ("p1/p1_imaging.nii.gz", "p1/p1_seg.nii.gz"),
            (["p2/p2_0000.nii.gz", "p2/p2_0001.nii.gz"], "p2/p2_mask.nii.gz"),
        ],
        [],
    ),
    "masks beside images of any name": (
        ["scans/a.nii.gz", "scans/b.nii.gz", "masks/a.nii.gz", "reports/c.txt", "other/x.nii.gz"],
        [("scans/a.nii.gz", "masks/a.nii.gz")],
        ["scans/b.nii.gz"],
    ),
    "masks below their images": (
        ["a_ct.nii.gz", "b_ct.nii.gz", "masks/a_ct.nii.gz", "masks/b_seg.nii.gz"],
        [("a_ct.nii.gz", "masks/a_ct.nii.gz"), ("b_ct.nii.gz", "masks/b_seg.nii.gz")],
        [],
    ),
    "all files in one folder": (
        ["volume-0.nii", "segmentation-0.nii", "volume-1.nii", "segmentation-1.nii", "volume-10.nii"],
        [("volume-0.nii", "segmentation-0.nii"), ("volume-1.nii", "segmentation-1.nii")],
        ["volume-10.nii"],
    ),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_images_and_masks_are_found(tmp_path, layout):
    files, pairs, unlabelled = FOLDERS[layout]
    content = folder_data_list(touch(tmp_path, *files))
    assert [(entry["image"], entry["label"]) for entry in content["training"]] == pairs
    assert content["unlabelled"] == unlabelled


UNCLEAR = {
    "two folders of masks": (["images/a.nii.gz", "labels/a.nii.gz", "masks/a.nii.gz"], "masks in labels or masks"),
    "two images of a case": (
        ["s/ct.nii.gz", "s/ct2.nii.gz", "s/seg.nii.gz"],
        r"2 images and 1 mask: ct.nii.gz, ct2",
    ),
    "two masks of a case": (
        ["s/ct.nii.gz", "s/seg.nii.gz", "s/label.nii.gz"],
        r"s should hold one case, .*label.nii.gz, seg",
    ),
    "two suffixes": (["s/ct.nii.gz", "s/ct.nii", "s/seg.nii.gz"], "ct.nii.* are both case 'ct'"),
    "two masks of one image": (
        ["img/a_ct.nii.gz", "label/a_seg.nii.gz", "label/a_mask.nii.gz"],
        r"not clear which belong together: .*a_ct.*a_mask.*a_seg",
    ),
    "a channel is missing": (
        ["imagesTr/p_0000.nii.gz", "imagesTr/p_0002.nii.gz", "labelsTr/p.nii.gz"],
        "p_0000.nii.gz has the channels 0000, 0002",
    ),
    "no name is shared": (
        ["images/a.nii.gz", "labels/b.nii.gz"],
        r"1 image \(a.nii.gz\) and 1 mask \(b.nii.gz\)",
    ),
    "no masks": (
        ["imagesTr/a.nii.gz", "labelsTr/readme.txt"],
        r"1 image \(a.nii.gz\) and 0 masks \(none\).*pre-training",
    ),
}


@pytest.mark.parametrize("layout", UNCLEAR)
def test_what_is_not_clear_is_refused_with_the_files(tmp_path, layout):
    files, message = UNCLEAR[layout]
    with pytest.raises(InputError, match=message):
        segmentation_scans(touch(tmp_path, *files), section="training", fold="all")


NO_LIST = {
    "images alone": (
        ["a.nii.gz", "b.nii.gz"],
        "no masks that are known.*Images without masks: use them for pre-training",
    ),
    "cases without masks": (["s1/ct.nii.gz", "s2/ct.nii.gz"], "images, but no masks"),
    "two folders that fit the masks": (
        ["scans/a.nii.gz", "old/a.nii.gz", "masks/a.nii.gz"],
        "Name the folder of the masks labels or masks, and its files like the images",
    ),
    "contours": (["ct/a.nii.gz", "contours/a.nii.gz"], "Name the folder of the masks labels or masks"),
    "a mask for each structure": (
        ["s1/ct.nii.gz", "s1/segmentations/liver.nii.gz"],
        "one for each structure: merge them",
    ),
    "another list": (["my_list.json"], "--data_list my_list.json"),
    "nothing": ([], "The folder .* holds: nothing"),
}


@pytest.mark.parametrize("layout", NO_LIST)
def test_a_folder_without_pairs_says_how_to_go_on(tmp_path, layout):
    files, message = NO_LIST[layout]
    with pytest.raises(InputError, match=message):
        segmentation_scans(touch(tmp_path, *files), section="training")


def test_masks_that_these_bundles_wrote_are_no_labels(tmp_path):
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz", "volumes.csv", "s/ct.nii.gz", "s/ct_seg.nii.gz")
    assert folder_data_list(tmp_path) is None
    (tmp_path / "volumes.csv").unlink()
    assert folder_data_list(tmp_path)["training"] == [{"image": "s/ct.nii.gz", "label": "s/ct_seg.nii.gz"}]


@pytest.mark.parametrize("suffix", ["Va", "Val", "_validation"])
def test_folders_of_validation_cases_are_the_validation_section(tmp_path, suffix):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", f"images{suffix}/b.nii.gz", f"images{suffix}/c.nii.gz")
    touch(tmp_path, f"labels{suffix}/b.nii.gz", "imagesTs/d.nii.gz", "labelsTs/d.nii.gz")
    content = folder_data_list(tmp_path)
    assert content == {
        "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
        "validation": [{"image": f"images{suffix}/b.nii.gz", "label": f"labels{suffix}/b.nii.gz"}],
        "unlabelled": [f"images{suffix}/c.nii.gz"],
        "test": ["imagesTs/d.nii.gz"],
    }
    (scan,) = segmentation_scans(tmp_path, section="validation", fold=None)
    assert scan["label"] == str(tmp_path / f"labels{suffix}/b.nii.gz")


def test_annotations_beside_labels_do_not_make_a_folder_unclear(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "annotations/a.json")
    assert folder_data_list(tmp_path)["training"] == [{"image": "images/a.nii.gz", "label": "labels/a.nii.gz"}]


@pytest.mark.parametrize(
    ("images", "masks"), [("TrainingImg", "TrainingMask"), ("train_images", "train_labels"), ("CT-img", "CT-seg")]
)
def test_folders_that_differ_in_their_last_word_are_images_and_masks(tmp_path, images, masks):
    """As in FLARE21, beside folders of images for validation and of something else."""
    touch(tmp_path, f"{images}/train_000_0000.nii.gz", f"{masks}/train_000.nii.gz", "ValidationImg/v_0000.nii.gz")
    touch(tmp_path, "docs/readme.txt", "TestMask/t.nii.gz", "TestImg/t.nii.gz")
    content = folder_data_list(tmp_path)
    assert content["training"] == [{"image": f"{images}/train_000_0000.nii.gz", "label": f"{masks}/train_000.nii.gz"}]
    assert content["unlabelled"] == ["ValidationImg/v_0000.nii.gz"] and "validation" not in content


def test_validation_folders_of_that_kind_are_the_validation(tmp_path):
    for part in ("train", "val"):
        touch(tmp_path, f"{part}_images/{part}1.nii.gz", f"{part}_masks/{part}1.nii.gz")
    content = folder_data_list(tmp_path)
    assert content["training"] == [{"image": "train_images/train1.nii.gz", "label": "train_masks/train1.nii.gz"}]
    assert content["validation"] == [{"image": "val_images/val1.nii.gz", "label": "val_masks/val1.nii.gz"}]


def test_several_folders_of_that_kind_are_not_chosen_from(tmp_path):
    for site in ("A", "B"):
        touch(tmp_path, f"{site}_images/1.nii.gz", f"{site}_masks/1.nii.gz")
    assert folder_data_list(tmp_path) is None


def test_pictures_of_an_earlier_run_are_no_images(tmp_path):
    touch(tmp_path, "old/b_seg.nii.gz", "old/b_masked.nii.gz", "old/b_reconstruction.nii.gz")
    assert folder_data_list(tmp_path) is None and folder_data_list(tmp_path / "old") is None
