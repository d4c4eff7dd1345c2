# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What the user points at becomes the right scans, or a message that helps."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bundles.common.data.data_list import (
    data_list_names,
    inference_scans,
    label_as_reference,
    segmentation_scans,
    unlabelled_scans,
)
from bundles.common.errors import InputError
from tests.common.data.written_lists import both, entry, names, split, touch, write_list

# ---- files of a section ----


def test_files_that_do_not_exist_are_counted_and_the_first_are_named(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}") for i in range(6)])
    shutil.rmtree(tmp_path / "labelsTr")
    with pytest.raises(InputError) as error:
        segmentation_scans(tmp_path, section="training", fold="all")
    message = str(error.value)
    assert "6 of 12 files of section 'training' do not exist" in message
    assert str(tmp_path / "labelsTr/c0.nii.gz") in message and "and 3 more" in message
    assert f"relative to its folder, {tmp_path}" in message


def test_files_may_be_missing_unless_no_scan_is_whole(tmp_path):
    write_list(tmp_path, training=[entry("a"), entry("b")])
    options = {"section": "training", "fold": "all", "may_be_missing": True}
    (tmp_path / "labelsTr/a.nii.gz").unlink()
    assert names(segmentation_scans(tmp_path, **options)) == ["a", "b"]
    (tmp_path / "imagesTr/b.nii.gz").unlink()
    with pytest.raises(InputError, match="2 of 4 files of section 'training' do not exist"):
        segmentation_scans(tmp_path, **options)


def test_a_missing_label_is_refused(tmp_path):
    write_list(tmp_path, training=[entry("a")], test=["imagesTs/t.nii.gz", {"image": "imagesTs/u.nii.gz", "label": ""}])
    with pytest.raises(InputError, match=r"2 of 2 scans of section 'test' have no 'label', e.g. .*t\.nii\.gz"):
        segmentation_scans(tmp_path, section="test")


def test_an_empty_section_names_the_sections_there_are(tmp_path):
    write_list(tmp_path, training=[entry("a")], validation=[entry("b")])
    with pytest.raises(InputError, match=r"no scans for section 'test'.*'training' \(1\), 'validation' \(1\)"):
        segmentation_scans(tmp_path, section="test")
    with pytest.raises(InputError, match="--section 'train' is not one of training, validation, test, all"):
        segmentation_scans(tmp_path, section="train")


def test_another_list_is_found_and_its_paths_are_relative_to_its_own_folder(tmp_path):
    path = write_list(tmp_path / "lists", "few.json", training=[entry("a")], validation=[entry("b")])
    expected = str(tmp_path / "lists/imagesTr/a.nii.gz")
    for data_list in ("lists/few.json", path):
        scans = segmentation_scans(tmp_path, data_list=data_list, section="training", fold=None)
        assert [scan["image"] for scan in scans] == [expected]


def test_only_the_files_that_a_section_needs_must_exist(tmp_path):
    write_list(tmp_path, training=[entry("a")], validation=[entry("b")], test=[entry("t")])
    (tmp_path / "imagesTr/t.nii.gz").unlink()
    assert split(tmp_path, fold=None) == (["a"], ["b"])
    with pytest.raises(InputError, match="1 of 2 files of section 'test' do not exist"):
        segmentation_scans(tmp_path, section="test")


def test_a_scan_that_trains_and_validates_is_reported(tmp_path, caplog):
    write_list(tmp_path, training=[entry("a"), entry("b")], validation=[entry("b")])
    split(tmp_path, fold=None)
    assert "1 scan is in both training and validation" in caplog.text and "b.nii.gz" in caplog.text


# ---- unlabelled_scans ----


def test_a_folder_gives_its_scans_recursively_without_labels_and_hidden_files(tmp_path):
    wanted = ["a.nii.gz", "deep/er/b.nii", "imagesTs/c.NII.GZ"]
    touch(tmp_path, *wanted, "labelsTr/a.nii.gz", "deep/Label_maps/b.nii", ".cache/d.nii", "deep/._b.nii", "notes.txt")
    scans = unlabelled_scans(tmp_path, section="all")
    assert [scan["image"] for scan in scans] == [str(tmp_path / name) for name in wanted]
    assert all(list(scan) == ["image"] for scan in scans)


def test_a_validation_section_of_any_source_is_the_validation_and_all_others_train(tmp_path):
    write_list(
        tmp_path / "a",
        training=[entry("a1")],
        validation=[entry("a2")],
        unlabeled=["extra/a3.nii.gz"],
        test=["imagesTs/a4.nii.gz"],
    )
    touch(tmp_path / "b", "b1.nii.gz", "b2.nii.gz")
    write_list(tmp_path / "c", "c.json", training=["c1.nii"])
    sources = [tmp_path / "a", str(tmp_path / "b"), tmp_path / "c/c.json", tmp_path / "b/b1.nii.gz"]
    assert [sorted(part) for part in both(sources)] == [["a1", "a3", "b1", "b2", "c1"], ["a2"]]


def test_a_file_reached_twice_counts_once_and_never_trains_when_it_validates(tmp_path):
    write_list(tmp_path / "a", training=["x.nii", "y.nii"], validation=["z.nii"])
    os.symlink(tmp_path / "a", tmp_path / "link")
    os.symlink(tmp_path / "a" / "z.nii", tmp_path / "again.nii")
    assert both([tmp_path / "a", tmp_path / "link", tmp_path / "again.nii"]) == (["x", "y"], ["z"])


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "disk/x.nii", "disk/y.nii")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "data/link")
    os.symlink(tmp_path / "disk", tmp_path / "disk/self")
    assert names(unlabelled_scans(tmp_path / "data", section="all")) == ["x", "y"]


def test_labels_of_the_list_need_not_exist_for_pre_training(tmp_path):
    write_list(tmp_path, training=[entry("a"), entry("b")])
    shutil.rmtree(tmp_path / "labelsTr")
    assert names(unlabelled_scans(tmp_path, section="all")) == ["a", "b"]


def test_no_scans_says_what_was_looked_for_where(tmp_path):
    touch(tmp_path, "slice1.dcm")
    with pytest.raises(InputError, match=r"No scans in .*dataset\.json, \*\.nii and \*\.nii\.gz.*slice1\.dcm.*DICOM"):
        unlabelled_scans(tmp_path, section="training")
    with pytest.raises(InputError, match=r"missing not found.*slice1\.dcm"):
        unlabelled_scans(tmp_path / "missing", section="training")
    write_list(tmp_path / "t", test=["t.nii"])
    with pytest.raises(InputError, match=r"no 'training' section to pre-train on.*'test' \(1\)"):
        unlabelled_scans(tmp_path / "t", section="training")


def test_one_scan_is_too_few_and_all_in_validation_leaves_none_to_train(tmp_path):
    touch(tmp_path, "a.nii")
    with pytest.raises(InputError, match=r"at least 2 scans.*1 found in .*a\.nii"):
        unlabelled_scans(tmp_path / "a.nii", section="training")
    write_list(tmp_path / "v", validation=["a.nii", "b.nii"])
    with pytest.raises(InputError, match="All 2 scans .* none is left for training"):
        unlabelled_scans(tmp_path / "v", section="training")


def test_one_absolute_list_for_several_folders_is_refused(tmp_path):
    touch(tmp_path, "a/x.nii", "b/y.nii")
    path = write_list(tmp_path, "some.json", training=["a/x.nii", "b/y.nii"])
    with pytest.raises(InputError, match=r"some\.json is one absolute path, but dataset_dir names 2 sources"):
        unlabelled_scans([tmp_path / "a", tmp_path / "b"], data_list=path, section="training")
    assert names(unlabelled_scans(tmp_path, data_list="some.json", section="all")) == ["x", "y"]


# ---- inference_scans ----


def test_a_case_has_one_name_in_all_folds(tmp_path):
    """Tables of a cross-validation know a case by its name."""
    patients = [f"{site}/p{number}" for site in ("site1", "site2") for number in range(3)]
    entries = [{"image": f"{patient}/ct.nii.gz", "label": f"{patient}/seg.nii.gz"} for patient in patients]
    test = [{"image": "tests/ct.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries, "test": test}))
    names = data_list_names(tmp_path, section="validation")
    assert names == {str(tmp_path / patient / "ct.nii.gz"): f"{patient}/ct" for patient in patients}
    assert data_list_names(tmp_path, section="test") == {str(tmp_path / "tests" / "ct.nii.gz"): "ct"}


def test_inference_takes_a_file_a_folder_or_the_test_section(tmp_path):
    write_list(tmp_path, labels={"0": "background"}, training=[entry("a")], test=[entry("t", patient="p"), "u.nii.gz"])
    (tmp_path / "u.nii.gz").rename(tmp_path / "imagesTr/u.nii.gz")
    write_list(tmp_path, training=[entry("a")], test=[entry("t", patient="p"), "imagesTr/u.nii.gz"])
    images = [{"image": str(tmp_path / f"imagesTr/{name}.nii.gz")} for name in "atu"]
    shutil.rmtree(tmp_path / "labelsTr")  # predicting needs no labels
    assert inference_scans(tmp_path / "imagesTr/a.nii.gz") == images[:1]
    assert inference_scans(tmp_path / "imagesTr") == images
    assert inference_scans(tmp_path) == images[1:]
    assert inference_scans(tmp_path / "dataset.json") == images[1:]
    touch(tmp_path, "direct.nii")
    assert inference_scans(tmp_path) == [{"image": str(tmp_path / "direct.nii")}]


def test_inference_without_scans_says_so(tmp_path):
    write_list(tmp_path, training=[entry("a")])
    with pytest.raises(InputError, match=r"dataset\.json has no 'test' section to predict.*'training' \(1\)"):
        inference_scans(tmp_path)
    with pytest.raises(InputError, match=r"b\.nii\.gz not found.*a\.nii\.gz"):
        inference_scans(tmp_path / "imagesTr/b.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="No scans in .*empty"):
        inference_scans(tmp_path / "empty")


def test_scans_of_one_name_are_refused_for_prediction_naming_both(tmp_path):
    for patient in ("p1", "p2"):
        (tmp_path / patient).mkdir()
        (tmp_path / patient / "ct.nii.gz").touch()
    with pytest.raises(InputError, match=r"p1/ct\.nii\.gz and .*p2/ct\.nii\.gz have the same name"):
        inference_scans(tmp_path)


def test_masks_and_results_are_not_taken_for_scans(tmp_path):
    for name in ("ct.nii.gz", "ct_seg.nii.gz", "ct_masked.nii.gz", "segmentations/liver.nii.gz", "labelsTr/ct.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [scan["image"] for scan in inference_scans(tmp_path)] == [str(tmp_path / "ct.nii.gz")]


def test_labels_beside_their_images_are_no_scans(tmp_path):
    touch(
        tmp_path,
        "p1/ct.nii.gz",
        "p1/label.nii.gz",
        "p2/scan.nii.gz",
        "p2/mask.nii.gz",
        "p3/mr.nii.gz",
        "labelled/x.nii.gz",
    )
    images = ["labelled/x.nii.gz", "p1/ct.nii.gz", "p2/scan.nii.gz", "p3/mr.nii.gz"]
    assert [os.path.relpath(scan["image"], tmp_path) for scan in inference_scans(tmp_path)] == images
    assert [os.path.relpath(scan["image"], tmp_path) for scan in unlabelled_scans(tmp_path, section="all")] == images


def test_several_sources_are_predicted_together_and_one_folder_is_trained_on(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).touch()
    assert len(inference_scans([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])) == 2
    with pytest.raises(InputError, match="must be a single folder"):
        segmentation_scans([str(tmp_path)], section="training")


def test_a_store_stands_in_the_order_of_its_scans(tmp_path):
    """So that the same draws read the same scans, however the files of the store are called."""
    stores = {"a": "store/z.b2nd", "b": "store/y.b2nd", "c": "store/x.b2nd"}
    for store in stores.values():
        (tmp_path / store).parent.mkdir(exist_ok=True)
        (tmp_path / store).touch()
    write_list(tmp_path, training=[entry(name) | {"store": store} for name, store in stores.items()])
    read = [Path(scan["image"]).name for scan in unlabelled_scans(tmp_path, section="all", stored=True)]
    assert read == ["z.b2nd", "y.b2nd", "x.b2nd"]
    write_list(tmp_path / "raw", training=[entry("a"), entry("b")])
    with pytest.raises(InputError, match="2 scans have no 'store'"):
        unlabelled_scans(tmp_path / "raw", section="all", stored=True)


# ---- carried labels ----


@pytest.mark.parametrize("section", ["validation", "test"])
@pytest.mark.parametrize("asked", ["training", "validation"])
def test_carried_labels_in_validation_and_test_are_refused(tmp_path, section, asked):
    path = write_list(
        tmp_path,
        **{"training": [entry("a"), entry("b")], "validation": [entry("v")], section: [entry("c", carried=True)]},
    )
    with pytest.raises(InputError, match=rf"{path}: section '{section}' has 1 .*labelsTr/c.nii.gz"):
        segmentation_scans(tmp_path, section=asked, fold=None)


def test_no_score_is_computed_against_carried_labels():
    scans = [{"image": "a", "label": "la"}, {"image": "b", "label": "lb", "carried": True}]
    assert label_as_reference(scans[:1]) == [{"image": "a", "reference": "la"}]
    with pytest.raises(InputError, match="carried labels, such as lb"):
        label_as_reference(scans)


def test_masks_beside_scans_are_not_pre_trained_on(tmp_path):
    for name in ("P01/ct", "P01/liver_mask", "P01/spleen_mask", "P02/ct", "TrainingMask/train_0", "P03_seg/ct"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    found = unlabelled_scans(tmp_path, section="all")
    assert [scan["image"] for scan in found] == [
        str(tmp_path / f"{name}/ct.nii.gz") for name in ("P01", "P02", "P03_seg")
    ]


def test_masks_beside_scans_are_not_predicted(tmp_path):
    for name in ("volume-0.nii.gz", "segmentation-0.nii.gz", "liver_mask.nii.gz", "dataset.json"):
        (tmp_path / name).touch()
    assert [scan["image"] for scan in inference_scans(tmp_path)] == [str(tmp_path / "volume-0.nii.gz")]
