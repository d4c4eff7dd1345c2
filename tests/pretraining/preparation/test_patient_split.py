# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""No patient and no scan lies on both sides of a split, and the split depends on the seed and the patients alone."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from bundles.common.errors import InputError
from bundles.pretraining.preparation.patient_split import find_twins, pseudonym, split_by_patient


def scan(name: str, patient="", section="", sha256="", label="", series_uid="") -> dict:
    known = {"patient": patient, "section": section, "label": label, "series_uid": series_uid}
    return {"name": name, "sha256": sha256 or name, **known}


def split(scans, share=0.2, folds=0, seed=0):
    return split_by_patient(scans, validation_share=share, folds=folds, seed=seed)


COHORT = [scan(f"s{i:02}", patient=f"p{i // 3}") for i in range(30)]  # ten patients with three scans each


def test_validation_holds_whole_patients_and_its_share_of_them():
    result = split(COHORT)
    held_out = {result.patients[name] for name, section in result.sections.items() if section == "validation"}
    training = {result.patients[name] for name, section in result.sections.items() if section == "training"}
    assert len(held_out) == 2
    assert not held_out & training
    assert Counter(result.sections.values()) == {"training": 24, "validation": 6}


def test_folds_hold_whole_patients():
    result = split(COHORT, folds=5)
    folds_of = {patient: set() for patient in result.patients.values()}
    for name, fold in result.folds.items():
        folds_of[result.patients[name]].add(fold)
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert Counter(result.folds.values()) == dict.fromkeys(range(5), 6)


def test_the_order_of_the_scans_does_not_matter_and_the_seed_does():
    shuffled = random.Random(0).sample(COHORT, len(COHORT))
    assert split(COHORT, folds=5) == split(shuffled, folds=5)
    assert len({str(sorted(split(COHORT, seed=seed).sections.items())) for seed in range(5)}) > 1


def test_scans_without_a_patient_are_patients_of_their_own():
    result = split([scan("a"), scan("b"), scan("c")])
    assert result.patients == {"a": "a", "b": "b", "c": "c"}
    assert Counter(result.sections.values()) == {"training": 2, "validation": 1}


def test_one_scan_trains_and_the_user_is_told():
    result = split([scan("a")], folds=5)
    assert result.sections == {"a": "training"}
    assert result.folds == {}
    assert len(result.notes) == 2 and "5 folds" in result.notes[1]


def test_no_validation_if_none_is_asked_for():
    result = split(COHORT, share=0)
    assert set(result.sections.values()) == {"training"}
    assert result.notes == []


@pytest.mark.parametrize("share", [-0.1, 1, True])
def test_share_out_of_range(share):
    with pytest.raises(InputError, match="validation_share"):
        split(COHORT, share=share)


@pytest.mark.parametrize("folds", [1, -1, 2.5, True, None])
def test_folds_out_of_range(folds):
    with pytest.raises(InputError, match="--folds"):
        split(COHORT, folds=folds)


# ---- sections of the lists -----------------------------------------------------------------------------------------


def test_a_validation_section_stands_and_all_others_train():
    result = split([scan("a", section="training"), scan("b", section="validation"), scan("c"), scan("d")])
    assert result.sections == {"a": "training", "b": "validation", "c": "training", "d": "training"}


def test_test_scans_stay_out_of_training_validation_and_folds():
    scans = [*COHORT, scan("t", patient="p99", section="test")]
    result = split(scans, folds=5)
    assert result.sections["t"] == "test"
    assert "t" not in result.folds
    assert Counter(result.sections.values()) == {"training": 24, "validation": 6, "test": 1}


def test_a_patient_in_two_sections_goes_to_the_one_held_out_and_is_reported():
    scans = [scan("a1", "A", "training"), scan("a2", "A", "validation"), scan("b", "B", "training"), scan("a3", "A")]
    result = split(scans)
    assert result.sections == {"a1": "validation", "a2": "validation", "a3": "validation", "b": "training"}
    (note,) = result.notes
    assert "patient A" in note and "a1 (training)" in note and "a2 (validation)" in note


# ---- equal scans ---------------------------------------------------------------------------------------------------


def test_of_equal_scans_the_labelled_one_is_kept_else_the_first():
    scans = [scan("a", sha256="x"), scan("b", sha256="x", label="b_label.nii.gz"), scan("c", sha256="x")]
    assert find_twins(scans) == {"a": "b", "c": "b"}
    assert find_twins([scan("b", sha256="x"), scan("a", sha256="x"), scan("c")]) == {"b": "a"}


def test_equal_scans_appear_once():
    result = split([scan("a", sha256="x"), scan("b", sha256="x"), scan("c"), scan("d")])
    assert set(result.sections) == {"a", "c", "d"}
    assert result.twins == {"b": "a"}


def test_equal_scans_tell_that_two_names_are_one_patient():
    """LUNA16 is drawn from LIDC-IDRI: the scan without a patient is of the known one, whose other scan must not be held out alone."""
    scans = [
        scan("LIDC__1", patient="LIDC-1", sha256="x", section="validation"),
        scan("LIDC__2", patient="LIDC-1"),
        scan("LUNA__1", sha256="x", section="training"),
        scan("other"),
    ]
    result = split(scans)
    assert result.patients["LUNA__1"] == result.patients["LIDC__2"] == "LIDC-1"
    assert result.sections == {"LIDC__1": "validation", "LIDC__2": "validation", "other": "training"}
    assert "LUNA__1 (training)" in result.notes[0]


def test_patients_that_share_equal_scans_are_one():
    scans = [
        scan("a", "P1", sha256="x"),
        scan("b", "P2", sha256="x"),
        scan("c", "P2", sha256="y"),
        scan("d", "P3", sha256="y"),
        scan("e", "P3"),
        scan("f", sha256="x"),
    ]
    assert set(split(scans).patients.values()) == {"P1"}


def test_scans_of_one_series_are_of_one_patient_even_if_their_voxels_differ():
    """A file of LUNA16 has the UID of its series in LIDC-IDRI for a name."""
    scans = [
        scan("LIDC", "LIDC-1", series_uid="1.3.6"),
        scan("LIDC 2", "LIDC-1"),
        scan("LUNA", series_uid="1.3.6"),
        scan("other"),
    ]
    result = split(scans)
    assert result.twins == {}
    assert result.patients == {"LIDC": "LIDC-1", "LIDC 2": "LIDC-1", "LUNA": "LIDC-1", "other": "other"}


def test_stacks_of_one_series_without_a_patient_are_of_one():
    assert split([scan("b", series_uid="1.2"), scan("a", series_uid="1.2")]).patients == {"a": "a", "b": "a"}


# ---- pseudonyms ----------------------------------------------------------------------------------------------------


def test_pseudonyms_are_the_same_for_the_same_patient_and_hide_the_id():
    assert pseudonym("Doe^Jane") == pseudonym(" Doe^Jane ") != pseudonym("Doe^John")
    assert re.fullmatch("p[0-9a-f]{12}", pseudonym("Doe^Jane"))
    assert pseudonym("") == pseudonym("  ") == ""


def test_a_scan_that_is_left_out_still_tells_that_two_are_of_one_patient():
    scans = [scan("luna", sha256="1", series_uid="1.2"), scan("lidc", sha256="2", patient="P")]
    other = {"name": "refused", "patient": "P", "series_uid": "1.2"}
    result = split_by_patient(scans, validation_share=0.5, folds=0, seed=0, left_out=[other])
    assert result.patients == {"luna": "P", "lidc": "P", "refused": "P"}
    assert result.sections == {"luna": "training", "lidc": "training"}
    nameless = [scan("b", sha256="1", series_uid="1.2"), scan("c", sha256="2")]
    other = {"name": "a", "patient": "", "series_uid": "1.2"}
    result = split_by_patient(nameless, validation_share=0.5, folds=0, seed=0, left_out=[other])
    assert result.patients["b"] == "b"  # not called after a scan that is not there
