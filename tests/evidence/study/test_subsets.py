# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Labelled subsets are nested and seeded, and never overlap with scored patients."""

from __future__ import annotations

import json
import os

import pytest

from bundles.common.errors import InputError
from evidence.study.subsets import divide, labelled_subset

from ..made_up_study import parts, rewrite


@pytest.fixture
def data(tmp_path):
    """Twenty training and five validation cases of empty files, in MSD form."""
    sections = {"training": [], "validation": []}
    for section, number in (("training", 20), ("validation", 5)):
        for i in range(number):
            case = {"image": f"{section}{i}.nii.gz", "label": f"label_{section}{i}.nii.gz"}
            for name in case.values():
                (tmp_path / name).touch()
            sections[section].append(case)
    content = {"labels": {"0": "background", "1": "liver"}, "modality": {"0": "CT"}, **sections}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def test_parts_never_overlap_and_have_every_patient(data):
    divided = divide(data, tuning=6)
    training, tuning, validation = map(set, (divided.training, divided.tuning, divided.validation))
    assert (len(training), len(tuning), len(validation)) == (14, 6, 5)
    assert not training & tuning and not training & validation and not tuning & validation
    assert validation == {f"validation{i}" for i in range(5)}


def test_smaller_subsets_lie_in_larger_ones_of_the_same_seed_and_in_the_training_part(data):
    divided = divide(data, tuning=6)
    for seed in range(5):
        subsets = [set(labelled_subset(divided, n=n, seed=seed)) for n in (1, 2, 8, 14)]
        assert [len(subset) for subset in subsets] == [1, 2, 8, 14]
        for smaller, larger in zip(subsets, subsets[1:], strict=False):
            assert smaller < larger
        assert subsets[-1] == set(divided.training)


def test_seeds_draw_other_subsets_and_the_same_seed_the_same(data):
    divided = divide(data, tuning=6)
    drawn = [tuple(labelled_subset(divided, n=4, seed=seed)) for seed in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


def test_the_draws_of_finished_studies_are_drawn_again(data):
    divided = divide(data, tuning=3)
    assert list(divided.tuning) == ["training11", "training18", "training6"]
    assert labelled_subset(divided, n=3, seed=0) == ["training17", "training7", "training9"]
    assert divide(data, tuning=3, seed=0) == divided and divide(data, tuning=3, seed=1) != divided
    assert divide(data).tuning == {}


def test_draws_do_not_depend_on_the_order_of_the_list(data):
    before = divide(data, tuning=6)
    rewrite(data, lambda content: content["training"].reverse())
    after = divide(data, tuning=6)
    assert list(after.tuning) == list(before.tuning)
    assert labelled_subset(after, n=4, seed=1) == labelled_subset(before, n=4, seed=1)


def test_a_fold_validates_where_the_list_has_no_section(data):
    rewrite(data, lambda content: content.pop("validation"))
    divided = divide(data, fold=0, folds=4, tuning=3)
    assert (len(divided.training), len(divided.tuning), len(divided.validation)) == (12, 3, 5)
    assert not set(divided.validation) & (set(divided.training) | set(divided.tuning))


def test_unlabelled_scans_are_for_pretraining(data):
    rewrite(data, lambda content: content.update(unlabelled=["more.nii.gz"]))
    (data / "more.nii.gz").touch()
    assert [case["image"] for case in divide(data).unlabelled] == [str(data / "more.nii.gz")]


def test_too_many_labelled_patients_are_refused_with_both_numbers():
    with pytest.raises(InputError, match="n = 13.*training part has 12.*3 for tuning"):
        labelled_subset(parts(), n=13, seed=0)


def test_too_many_tuning_patients_are_refused(data):
    with pytest.raises(InputError, match="tuning 20 patients.*20 training patients"):
        divide(data, tuning=20)


def test_a_case_in_two_sections_is_refused(data):
    rewrite(data, lambda content: content["validation"].append(content["training"][0]))
    with pytest.raises(InputError, match="training0"):
        divide(data)


@pytest.mark.parametrize(
    ("note", "words"), [({"carried": True}, "carried labels"), ({"labelled": ["liver"]}, "show all structures")]
)
def test_labels_that_no_study_can_count_are_refused(data, note, words):
    rewrite(data, lambda content: content["training"][3].update(note))
    with pytest.raises(InputError, match=words):
        divide(data)


def test_two_scans_of_a_patient_are_refused(data):
    rewrite(data, lambda content: [case.update(patient="p1") for case in content["training"][:2]])
    with pytest.raises(InputError, match="20 training scans are of 19 patients"):
        divide(data)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        divide(tmp_path / "nowhere")


def test_training_images_that_are_listed_again_as_unlabelled_count_once(data):
    (data / "link.nii.gz").symlink_to(data / "training3.nii.gz")
    (data / "more.nii.gz").touch()
    again = ["training2.nii.gz", "link.nii.gz", "more.nii.gz", "more.nii.gz"]
    rewrite(data, lambda content: content.update(unlabelled=again, unlabeled=["more.nii.gz"]))
    divided = divide(data, tuning=6)
    assert [case["image"] for case in divided.unlabelled] == [str(data / "more.nii.gz")]
    assert len(divided.training) + len(divided.tuning) == 20


@pytest.mark.parametrize("section", ["unlabelled", "unlabeled"])
@pytest.mark.parametrize(
    "entry", ["validation1.nii.gz", "link.nii.gz", {"image": ["more.nii.gz", "validation1.nii.gz"]}]
)
def test_validation_images_among_the_unlabelled_are_refused(data, section, entry):
    (data / "link.nii.gz").symlink_to(data / "validation1.nii.gz")
    (data / "more.nii.gz").touch()
    rewrite(data, lambda content: content.update({section: ["more.nii.gz", entry]}))
    name = entry if isinstance(entry, str) else entry["image"][0]
    with pytest.raises(InputError, match=f"{name} is in the unlabelled and in the validation section"):
        divide(data)


def test_validation_images_of_a_fold_among_the_unlabelled_are_refused(data):
    rewrite(data, lambda content: content.update(unlabelled=[case["image"] for case in content.pop("validation")]))
    divide(data, fold=None, tuning=3)  # unlabelled images validate nothing
    rewrite(data, lambda content: content.update(unlabelled=[case["image"] for case in content["training"]]))
    with pytest.raises(InputError, match="is in the unlabelled and in the validation section"):
        divide(data, fold=0, folds=4)


def test_a_hard_link_of_a_validation_image_is_refused(data):
    os.link(data / "validation1.nii.gz", data / "other_name.nii.gz")
    rewrite(data, lambda content: content.update(unlabelled=["other_name.nii.gz"]))
    with pytest.raises(InputError, match="other_name.nii.gz is in the unlabelled and in the validation section"):
        divide(data)


def test_a_file_that_validates_twice_by_a_hard_link_is_refused(data):
    os.link(data / "validation2.nii.gz", data / "other_name.nii.gz")
    again = {"image": "other_name.nii.gz", "label": "label_validation2.nii.gz"}
    rewrite(data, lambda content: content["validation"].append(again))
    with pytest.raises(InputError, match="validation section contains .*/(other_name|validation2).nii.gz twice"):
        divide(data)


def test_a_training_image_that_is_a_link_to_a_validation_image_is_refused(data):
    (data / "training7.nii.gz").unlink()
    (data / "training7.nii.gz").symlink_to(data / "validation2.nii.gz")
    with pytest.raises(InputError, match="training7.nii.gz is in the training and in the validation section"):
        divide(data)


@pytest.mark.parametrize("section", ["training", "unlabelled"])
def test_a_patient_who_validates_and_trains_is_refused(data, section):
    (data / "more.nii.gz").touch()

    def change(content):
        content["unlabelled"] = [{"image": "more.nii.gz"}]
        content["validation"][2]["patient"] = 17
        content[section][0]["patient"] = "17"

    rewrite(data, change)
    file = {"training": "training0", "unlabelled": "more"}[section]
    with pytest.raises(InputError, match=rf"patient 17 \(.*{file}.nii.gz\) is in the {section} and in the validation"):
        divide(data)


def test_a_patient_who_validates_twice_is_refused(data):
    rewrite(data, lambda content: [case.update(patient="p9") for case in content["validation"][:2]])
    with pytest.raises(InputError, match="5 validation scans are of 4 patients; p9 has more than one"):
        divide(data)


def test_a_file_that_validates_twice_is_refused(data):
    (data / "link.nii.gz").symlink_to(data / "validation2.nii.gz")
    again = {"image": "link.nii.gz", "label": "label_validation2.nii.gz"}
    rewrite(data, lambda content: content["validation"].append(again))
    with pytest.raises(InputError, match="validation section contains .*validation2.nii.gz twice"):
        divide(data)
