# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a probe list must have, and the one message for each that has not."""

from __future__ import annotations

import json

import pytest

from bundles.common.errors import InputError
from bundles.pretraining.probe.probe_list import probe_classes, probe_facts, probe_ignore_label, probe_scans

LABELS = {"0": "background", "10": "Left kidney", "2": "liver"}


@pytest.fixture
def scans(tmp_path):
    """Entries of four scans whose files exist."""
    entries = []
    for number in range(4):
        entry = {"image": f"image{number}.nii.gz", "label": f"label{number}.nii.gz"}
        for file in entry.values():
            (tmp_path / file).write_bytes(b"")
        entries.append(entry)
    return entries


def write(tmp_path, **content):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_sections_and_classes_are_those_of_the_list(tmp_path, scans):
    file = write(tmp_path, labels=LABELS, training=scans[:3], validation=scans[3:])
    training, validation = (probe_scans(file=file, section=each) for each in ("training", "validation"))
    assert [scan["image"] for scan in training] == [str(tmp_path / f"image{number}.nii.gz") for number in range(3)]
    assert validation == [{"image": str(tmp_path / "image3.nii.gz"), "label": str(tmp_path / "label3.nii.gz")}]
    assert list(probe_classes(file=file).items()) == [(0, "background"), (2, "liver"), (10, "left_kidney")]


def test_without_a_list_there_is_no_probe():
    assert probe_scans(file=None, section="training") == [] and probe_classes(file=None) == {}
    assert probe_facts(file=None) is None


def test_the_value_of_unknown_voxels_is_that_of_the_list(tmp_path, scans):
    content = {"labels": LABELS, "training": scans[:2], "validation": scans[2:]}
    assert probe_ignore_label(file=None) is None and probe_ignore_label(file=write(tmp_path, **content)) == 255
    assert probe_ignore_label(file=write(tmp_path, ignore_label=7, **content)) == 7
    with_255 = {**content, "labels": {**LABELS, "255": "air"}}
    assert probe_ignore_label(file=write(tmp_path, **with_255)) is None
    with pytest.raises(InputError, match="ignore_label 2 is also one of its labels"):
        probe_ignore_label(file=write(tmp_path, ignore_label=2, **content))


def test_facts_change_with_the_sections_and_the_classes_and_not_with_the_folder(tmp_path, scans):
    content = {"labels": LABELS, "training": scans[:2], "validation": scans[2:]}
    facts = probe_facts(file=write(tmp_path, **content))
    assert facts["classes"] == ["background", "liver", "left_kidney"]
    assert (facts["training"]["number"], facts["validation"]["number"]) == (2, 2)
    moved = {**content, "training": scans[:3], "validation": scans[3:]}
    swapped = {**content, "training": scans[2:], "validation": scans[:2]}
    renamed = {**content, "labels": {**LABELS, "2": "spleen"}}
    others = [probe_facts(file=write(tmp_path, **other)) for other in (moved, swapped, renamed)]
    assert facts not in others and len({json.dumps(each) for each in others}) == 3


def refusal(tmp_path, **content):
    with pytest.raises(InputError) as error:
        file = write(tmp_path, **content)
        probe_classes(file=file)
        probe_scans(file=file, section="training")
        probe_scans(file=file, section="validation")
    assert str(tmp_path / "probe.json") in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_missing_section(tmp_path, scans, section):
    content = {"training": scans[:2], "validation": scans[2:]}
    content[section] = []
    message = refusal(tmp_path, labels=LABELS, **content)
    assert f"has no '{section}' section" in message and "different patients" in message


@pytest.mark.parametrize("position", [0, 3])
def test_a_scan_without_a_label(tmp_path, scans, position):
    del scans[position]["label"]
    message = refusal(tmp_path, labels=LABELS, training=scans[:2], validation=scans[2:])
    assert "1 of 2 scans" in message and f"image{position}.nii.gz" in message and "Add their labels" in message


def test_a_file_that_does_not_exist(tmp_path, scans):
    (tmp_path / "label1.nii.gz").unlink()
    assert "label1.nii.gz" in refusal(tmp_path, labels=LABELS, training=scans[:2], validation=scans[2:])


def test_the_same_scan_in_both_sections_even_through_a_link(tmp_path, scans):
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "image0.nii.gz")
    linked = {**scans[3], "image": "link.nii.gz"}
    message = refusal(tmp_path, labels=LABELS, training=scans[:2], validation=[scans[2], linked])
    assert "scan" in message and "image0.nii.gz is in 'training' and in 'validation'" in message


def test_the_same_patient_in_both_sections(tmp_path, scans):
    scans = [{**scan, "patient": patient} for scan, patient in zip(scans, ("a", "b", "c", "b"), strict=True)]
    message = refusal(tmp_path, labels=LABELS, training=scans[:2], validation=scans[2:])
    assert "patient b is in 'training' and in 'validation' (1 such)" in message
    file = write(tmp_path, labels=LABELS, training=[scans[1], scans[3]], validation=[scans[0]])
    assert len(probe_scans(file=file, section="training")) == 2  # twice in one section is no matter


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "it has no labels"),
        ({"0": "background"}, "name its label values"),
        ({"1": "liver", "2": "spleen"}, "the background too"),
        ({"0": "background", "1": "Liver", "2": "liver"}, "a name of its own"),
        ({"0": "background", "1": "?"}, "with letters or digits"),
        ({"zero": "background"}, "must map label values to names"),
    ],
)
def test_labels_that_do_not_name_the_classes(tmp_path, scans, labels, said):
    assert said in refusal(tmp_path, labels=labels, training=scans[:2], validation=scans[2:])


def test_something_that_is_no_list(tmp_path):
    for file in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(InputError, match=f"--probe_list {file} is not a file"):
            probe_scans(file=str(file), section="training")
