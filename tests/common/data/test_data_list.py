# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What the user points at becomes the right scans, the right split, or a message that helps."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from bundles.common.data.data_list import (
    data_list_labels,
    inference_scans,
    label_as_reference,
    parse_data_list,
    segmentation_scans,
    unlabelled_scans,
)
from bundles.common.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def entry(name: str, **extra) -> dict:
    return {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz", **extra}


def write_list(folder: Path, name: str = "dataset.json", **content) -> Path:
    """Write a data list and an empty file for every path that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    for section in content.values():
        for scan in section if isinstance(section, list) else []:
            scan = {"image": scan} if isinstance(scan, str) else scan
            touch(
                (folder / name).parent,
                *(scan[key] for key in ("image", "label") if isinstance(scan.get(key), str) and scan[key]),
            )
    return folder / name


def names(scans: list[dict]) -> list[str]:
    return [Path(scan["image"]).name.split(".")[0] for scan in scans]


def split(folder: Path, **options) -> tuple[list[str], list[str]]:
    return tuple(
        names(segmentation_scans(folder, section=section, **options)) for section in ("training", "validation")
    )


# ---- parse_data_list ----


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


def test_patients_of_some_scans_only_are_told(tmp_path, caplog):
    scans = [
        entry("a", patient=1),
        entry("b", patient="1"),
        entry("c", patient=None),
        entry("d"),
        entry("e", patient=2),
    ]
    write_list(tmp_path, training=scans)
    for fold in range(4):
        training, validation = split(tmp_path, fold=fold, folds=4)
        assert ("a" in training) == ("b" in training)  # 1 and "1" are one patient
    assert "2 of 4 scans name no patient, such as" in caplog.text
    caplog.clear()
    training = unlabelled_scans(tmp_path, section="training")
    assert "2 of 5 scans name no patient" in caplog.text and len(training) >= 3


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


def test_files_that_do_not_exist_are_counted_and_the_first_are_named(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}") for i in range(6)])
    shutil.rmtree(tmp_path / "labelsTr")
    with pytest.raises(InputError) as error:
        segmentation_scans(tmp_path, section="training", fold="all")
    message = str(error.value)
    assert "6 of 12 files of section 'training' do not exist" in message
    assert str(tmp_path / "labelsTr/c0.nii.gz") in message and "and 3 more" in message
    assert f"relative to its folder, {tmp_path}" in message


def test_labels_that_are_no_numbers_are_refused_and_absent_ones_are_empty(tmp_path):
    write_list(tmp_path, training=["a.nii.gz"])
    assert data_list_labels(tmp_path) == {}
    write_list(tmp_path, training=["a.nii.gz"], labels={"background": 0})
    with pytest.raises(InputError, match="'labels' must map label values to names"):
        data_list_labels(tmp_path)


# ---- segmentation_scans ----


def test_each_case_validates_in_exactly_one_fold_and_trains_in_all_others(tmp_path):
    cases = [f"c{i:02d}" for i in range(13)]
    write_list(tmp_path, training=[entry(c) for c in cases[:10]], validation=[entry(c) for c in cases[10:]])
    validated = []
    for fold in range(5):
        training, validation = split(tmp_path, fold=fold)
        assert sorted(training + validation) == cases
        assert len(validation) in (2, 3)
        validated += validation
    assert sorted(validated) == cases
    assert split(tmp_path, fold=0) != split(tmp_path, fold=0, seed=1)


def test_the_folds_depend_neither_on_the_order_of_the_list_nor_on_where_it_lies(tmp_path):
    cases = [f"c{i:02d}" for i in range(20)]
    write_list(tmp_path / "one", training=[entry(c) for c in cases])
    random.Random(0).shuffle(cases)
    write_list(tmp_path / "elsewhere/two", training=[entry(c) for c in cases])
    for fold in range(5):
        first, second = split(tmp_path / "one", fold=fold), split(tmp_path / "elsewhere/two", fold=fold)
        assert set(first[1]) == set(second[1]) and set(first[0]) == set(second[0])


def test_the_scans_of_one_patient_stay_together(tmp_path):
    write_list(tmp_path, training=[entry(f"p{i % 6}_{i}", patient=f"p{i % 6}") for i in range(24)])
    for fold in range(3):
        training, validation = split(tmp_path, fold=fold, folds=3)
        assert len(validation) == 8
        assert not {c.split("_")[0] for c in training} & {c.split("_")[0] for c in validation}


def test_folds_that_the_list_carries_win(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}", fold=i % 3) for i in range(6)])
    assert split(tmp_path, fold=1) == (["c0", "c2", "c3", "c5"], ["c1", "c4"])
    with pytest.raises(InputError, match=r"fold must be one of \[0, 1, 2\] or 'all', got 3"):
        split(tmp_path, fold=3)


def test_folds_that_only_some_entries_carry_are_refused(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}", **({"fold": 0} if i else {})) for i in range(6)])
    with pytest.raises(InputError, match="5 of 6 training and validation entries have a 'fold'"):
        split(tmp_path, fold=0)


def test_fold_none_uses_the_validation_section_of_the_list_else_fold_0(tmp_path):
    write_list(tmp_path / "own", training=[entry("a"), entry("b")], validation=[entry("c")])
    assert split(tmp_path / "own", fold=None) == (["a", "b"], ["c"])
    write_list(tmp_path / "none", training=[entry(f"c{i}") for i in range(8)])
    assert split(tmp_path / "none", fold=None) == split(tmp_path / "none", fold=0)


def test_fold_all_trains_on_everything_and_validates_on_nothing(tmp_path):
    write_list(tmp_path, training=[entry("a"), entry("b")], validation=[entry("c")], test=["imagesTs/t.nii.gz"])
    assert names(segmentation_scans(tmp_path, section="training", fold="all")) == ["a", "b", "c"]
    assert segmentation_scans(tmp_path, section="validation", fold="all", may_be_empty=True) == []
    with pytest.raises(InputError, match="none is left for validation. Use --section training"):
        segmentation_scans(tmp_path, section="validation", fold="all")
    assert names(segmentation_scans(tmp_path, section="all")) == ["a", "b", "c"]


def test_fewer_patients_than_folds_names_the_three_ways_out(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}", patient=str(i % 2)) for i in range(10)])
    with pytest.raises(InputError, match=r'2 patient.* 5 folds.*"validation" section.*--folds.*--fold all'):
        split(tmp_path, fold=0, folds=5)


def test_without_a_number_of_folds_few_patients_are_held_out_one_by_one(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}", patient=str(i % 3)) for i in range(9)])
    held_out = [split(tmp_path, fold=fold, folds=None)[1] for fold in range(3)]
    assert sorted(sum(held_out, [])) == [f"c{i}" for i in range(9)] and all(len(part) == 3 for part in held_out)
    with pytest.raises(InputError, match=r"fold must be one of \[0, 1, 2\]"):
        split(tmp_path, fold=3, folds=None)
    write_list(tmp_path / "many", training=[entry(f"c{i}") for i in range(8)])
    with pytest.raises(InputError, match=r"fold must be one of \[0, 1, 2, 3, 4\]"):
        split(tmp_path / "many", fold=5, folds=None)
    write_list(tmp_path / "one", training=[entry("c")])
    with pytest.raises(InputError, match=r"1 patient.*--fold all"):
        split(tmp_path / "one", fold=0, folds=None)


@pytest.mark.parametrize("fold", [5, -1, "0", True, 1.5])
def test_a_fold_that_does_not_exist_is_refused_with_those_that_do(tmp_path, fold):
    write_list(tmp_path, training=[entry(f"c{i}") for i in range(10)])
    with pytest.raises(InputError, match=r"fold must be one of \[0, 1, 2, 3, 4\] or 'all', got"):
        split(tmp_path, fold=fold)


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


def both(source, **options) -> tuple[list[str], list[str]]:
    return tuple(names(unlabelled_scans(source, section=s, **options)) for s in ("training", "validation"))


def test_a_folder_gives_its_scans_recursively_without_labels_and_hidden_files(tmp_path):
    wanted = ["a.nii.gz", "deep/er/b.nii", "imagesTs/c.NII.GZ"]
    touch(tmp_path, *wanted, "labelsTr/a.nii.gz", "deep/Label_maps/b.nii", ".cache/d.nii", "deep/._b.nii", "notes.txt")
    scans = unlabelled_scans(tmp_path, section="all")
    assert [scan["image"] for scan in scans] == [str(tmp_path / name) for name in wanted]
    assert all(list(scan) == ["image"] for scan in scans)


def test_the_held_out_share_is_seeded_and_disjoint_from_training(tmp_path):
    touch(tmp_path, *(f"c{i:02d}.nii.gz" for i in range(40)))
    training, validation = both(tmp_path, validation_share=0.1)
    assert len(validation) == 4 and sorted(training + validation) == [f"c{i:02d}" for i in range(40)]
    assert both(tmp_path, validation_share=0.1) == (training, validation)
    assert both(tmp_path, validation_share=0.1, seed=1)[1] != validation
    assert len(both(tmp_path, validation_share=0.001)[1]) == 1
    with pytest.raises(InputError, match="validation_share must be between 0 and 1, got 5"):
        both(tmp_path, validation_share=5)


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


def test_pre_training_never_has_a_patient_on_both_sides(tmp_path):
    scans = [entry(f"p{i % 4}_{i}", patient=str(i % 4)) for i in range(12)]
    write_list(tmp_path, training=scans)
    training, validation = (
        {Path(scan["image"]).name[:2] for scan in unlabelled_scans(tmp_path, section=section, validation_share=0.3)}
        for section in ("training", "validation")
    )
    assert len(validation) == 1 and not training & validation and len(training | validation) == 4


def test_scans_of_one_patient_alone_are_split_with_a_warning(tmp_path, caplog):
    write_list(tmp_path, training=[entry(f"c{i}", patient="ANON") for i in range(4)])
    assert len(unlabelled_scans(tmp_path, section="validation")) == 1
    assert "all 4 scans are of patient 'ANON'" in caplog.text


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


def test_carried_labels_change_no_fold_and_are_in_training_only(tmp_path):
    real = [entry(name) for name in "abcdefgh"]
    carried = [entry(f"c{number}", carried=True) for number in range(20)]
    write_list(tmp_path / "real", training=real)
    write_list(tmp_path / "both", training=[*carried[:7], *real, *carried[7:]])
    for fold in range(4):
        training, validation = split(tmp_path / "real", fold=fold, folds=4)
        with_carried = split(tmp_path / "both", fold=fold, folds=4)
        assert with_carried[1] == validation
        assert sorted(with_carried[0]) == sorted([*training, *(f"c{number}" for number in range(20))])
    assert len(segmentation_scans(tmp_path / "both", section="training", fold="all")) == 28


def test_a_carried_label_of_a_validation_patient_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    real = [entry(name, patient=name) for name in "abcd"]
    carried = [entry(f"{name}_carried", patient=name, carried=True) for name in "abcd"]
    write_list(tmp_path, training=[*real, *carried])
    for fold in range(4):
        training, (held_out,) = split(tmp_path, fold=fold, folds=4)
        assert sorted(training) == sorted(
            each for name in "abcd" if name != held_out for each in (name, f"{name}_carried")
        )
    assert "1 of 4 cases with carried labels are left out" in caplog.text


def test_a_carried_label_of_the_validation_fold_is_left_out(tmp_path):
    real = [entry(f"r{number}", fold=number) for number in range(3)]
    carried = [entry(f"c{number}", fold=number, carried=True) for number in range(3)] + [entry("c", carried=True)]
    write_list(tmp_path, training=real + carried)
    assert split(tmp_path, fold=1) == (["r0", "r2", "c0", "c2", "c"], ["r1"])


def test_notes_of_an_entry_are_kept_and_checked(tmp_path):
    path = write_list(tmp_path, training=[entry("a", weight=0.5, carried=True), entry("b")])
    first, second = segmentation_scans(tmp_path, section="training", fold="all")
    assert (first["weight"], first["carried"]) == (0.5, True) and second.keys() == {"image", "label"}
    write_list(tmp_path, training=[entry("a"), entry("b", weight=0)])
    with pytest.raises(InputError, match=rf"{path}: training\[1\] has the weight 0:"):
        parse_data_list(path)


def test_no_score_is_computed_against_carried_labels():
    scans = [{"image": "a", "label": "la"}, {"image": "b", "label": "lb", "carried": True}]
    assert label_as_reference(scans[:1]) == [{"image": "a", "reference": "la"}]
    with pytest.raises(InputError, match="carried labels, such as lb"):
        label_as_reference(scans)


def test_brackets_without_end_are_refused(tmp_path):
    (tmp_path / "dataset.json").write_text('{"training": ' + "[" * 200_000)
    with pytest.raises(InputError, match=r"dataset\.json is not a JSON data list: its brackets are nested too deeply"):
        parse_data_list(tmp_path / "dataset.json")


def test_folds_may_be_written_as_text(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}", fold=str(i % 2)) for i in range(4)])
    held_out = segmentation_scans(str(tmp_path), section="validation", fold=1)
    assert [Path(scan["image"]).name for scan in held_out] == [Path(entry(f"c{i}")["image"]).name for i in (1, 3)]


@pytest.mark.parametrize("fold", [[0], {"a": 1}, None, True, "", 1.5])
def test_folds_that_are_none_are_named(tmp_path, fold):
    write_list(tmp_path, training=[entry(f"c{i}", fold=0 if i else fold) for i in range(4)])
    with pytest.raises(InputError, match="c0.*has fold .*it must be a number"):
        segmentation_scans(str(tmp_path), section="validation", fold=0)


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


def test_paths_that_were_written_on_windows_are_found(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    for name in ("a.nii.gz", "b\\c.nii.gz"):  # the second is one name here
        (tmp_path / "imagesTr" / name).touch()
    images = [".\\imagesTr\\a.nii.gz", "imagesTr/b\\c.nii.gz"]
    (tmp_path / "dataset.json").write_text(json.dumps({"test": images}))
    found = [scan["image"] for scan in inference_scans(tmp_path / "dataset.json")]
    assert found == [str(tmp_path / "imagesTr" / name) for name in ("a.nii.gz", "b\\c.nii.gz")]
