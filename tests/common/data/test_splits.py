# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""No patient is on both sides of a split, and a split depends on the seed and the patients alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bundles.common.data.data_list import segmentation_scans, unlabelled_scans
from bundles.common.data.splits import split_entries
from bundles.common.errors import InputError
from tests.common.data.written_lists import both, entry, names, split, touch, write_list


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


def test_folds_may_be_written_as_text(tmp_path):
    write_list(tmp_path, training=[entry(f"c{i}", fold=str(i % 2)) for i in range(4)])
    held_out = segmentation_scans(str(tmp_path), section="validation", fold=1)
    assert [Path(scan["image"]).name for scan in held_out] == [Path(entry(f"c{i}")["image"]).name for i in (1, 3)]


@pytest.mark.parametrize("fold", [[0], {"a": 1}, None, True, "", 1.5])
def test_folds_that_are_none_are_named(tmp_path, fold):
    write_list(tmp_path, training=[entry(f"c{i}", fold=0 if i else fold) for i in range(4)])
    with pytest.raises(InputError, match="c0.*has fold .*it must be a number"):
        segmentation_scans(str(tmp_path), section="validation", fold=0)


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


def test_a_label_that_was_carried_from_a_validation_case_is_left_out(tmp_path, caplog):
    real = [entry(name, patient="p" if name in "ab" else name) for name in "abcd"]
    carried = [
        entry(f"from_{names}", carried=True, carried_from=[f"imagesTr/{n}.nii.gz" for n in names])
        for names in ("a", "bc", "cd", "d")
    ]
    write_list(tmp_path, training=[*real, *carried])
    for fold in range(3):
        training, validation = split(tmp_path, fold=fold, folds=3)
        seen = "".join(name.removeprefix("from_") for name in training)
        assert not set(seen) & {*validation, *("ab" if {"a", "b"} & {*validation} else "")}
        assert (
            "labels were carried from validation cases. To use all, train on all real cases (--fold all)" in caplog.text
        )
        caplog.clear()
    assert len(segmentation_scans(tmp_path, section="training", fold="all")) == 8


def test_a_carried_label_of_the_validation_fold_is_left_out(tmp_path):
    real = [entry(f"r{number}", fold=number) for number in range(3)]
    carried = [entry(f"c{number}", fold=number, carried=True) for number in range(3)] + [entry("c", carried=True)]
    write_list(tmp_path, training=real + carried)
    assert split(tmp_path, fold=1) == (["r0", "r2", "c0", "c2", "c"], ["r1"])


@pytest.mark.parametrize("own", ["sections", "folds", "several lists"])
def test_a_patient_that_the_list_puts_on_both_sides_is_told(tmp_path, caplog, own):
    there = {"patient": "P1"}
    if own == "several lists":
        write_list(tmp_path / "a", training=[entry("a0")], validation=[entry("a1", **there)])
        write_list(tmp_path / "b", training=[entry("b0", **there), entry("b1")])
        unlabelled_scans([tmp_path / "a", tmp_path / "b"], section="training")
    elif own == "sections":
        write_list(tmp_path, training=[entry("a", **there), entry("b", patient="P2")], validation=[entry("c", **there)])
        segmentation_scans(tmp_path, section="training", fold=None)
    else:
        entries = [entry("a", fold=0, **there), entry("b", fold=1, **there), entry("c", fold=1, patient="P2")]
        write_list(tmp_path, training=entries)
        segmentation_scans(tmp_path, section="training", fold=0)
    (told,) = [message for message in caplog.messages if "in both training and validation" in message]
    assert "1 patient is" in told and "such as patient P1" in told
    caplog.clear()
    write_list(tmp_path / "good", training=[entry("a", **there), entry("b", **there), entry("c", patient="P2")])
    segmentation_scans(tmp_path / "good", section="training", fold=0)
    assert not caplog.messages


def test_a_label_that_was_carried_from_the_validation_section_is_left_out(tmp_path, caplog):
    seen = [str(tmp_path / "imagesTr" / "v.nii.gz")]
    carried = [
        entry("b", carried=True, carried_from=seen),
        entry("c", carried=True, carried_from=["./imagesTr/a.nii.gz"]),
    ]
    write_list(tmp_path, training=[carried[1], entry("a"), carried[0]], validation=[entry("v")])
    assert names(segmentation_scans(tmp_path, section="training", fold=None)) == ["c", "a"]
    assert "their labels were carried from validation cases" in caplog.text


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


def test_the_held_out_share_is_seeded_and_disjoint_from_training(tmp_path):
    touch(tmp_path, *(f"c{i:02d}.nii.gz" for i in range(40)))
    training, validation = both(tmp_path, validation_share=0.1)
    assert len(validation) == 4 and sorted(training + validation) == [f"c{i:02d}" for i in range(40)]
    assert both(tmp_path, validation_share=0.1) == (training, validation)
    assert both(tmp_path, validation_share=0.1, seed=1)[1] != validation
    assert len(both(tmp_path, validation_share=0.001)[1]) == 1
    with pytest.raises(InputError, match="--validation_share 5 must be a number above 0 and below 1"):
        both(tmp_path, validation_share=5)


@pytest.mark.parametrize("share", [0, 1, -0.1, "x", None, True])
def test_a_share_that_leaves_a_side_empty_or_is_no_number_is_refused(tmp_path, share):
    write_list(tmp_path, training=[entry(name) for name in "abc"])
    with pytest.raises(InputError, match=r"--validation_share .* must be a number above 0 and below 1"):
        unlabelled_scans(tmp_path, section="training", validation_share=share)


def test_a_number_of_folds_that_is_none_is_refused_even_if_the_list_is_divided(tmp_path):
    content = {"training": [{"image": "a", "fold": 0}], "validation": [{"image": "b", "fold": 1}]}
    for folds in ("abc", 1, 2.5):
        with pytest.raises(InputError, match=f"--folds {folds!r} must be a whole number, 2 or more"):
            split_entries(content, tmp_path / "dataset.json", fold=None, folds=folds, seed=0)
