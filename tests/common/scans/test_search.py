# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every scan below a folder is found once, named apart from all others, and what is no scan is left alone or refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from bundles.common.errors import InputError
from bundles.common.scans import search as scan_sources
from bundles.common.scans.search import LONGEST_NAME, find_candidates

from .dicom_files import write_series

STORED = np.zeros((4, 5, 9), np.int16)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not looked into")
    return folder


def names(*sources: Path, **options) -> list[str]:
    return [candidate.name for candidate in find_candidates(list(sources), **options).candidates]


# ---- what is found -------------------------------------------------------------------------------------------------


def test_nifti_files_at_any_depth_are_found(tmp_path):
    touch(tmp_path / "raw", "a.nii.gz", "b.nii", "site 1/deep/c.NII.GZ", "notes.txt", "table.csv")
    assert names(tmp_path / "raw") == ["raw__a", "raw__b", "raw__site_1__deep__c"]


def test_hidden_files_masks_and_results_are_no_scans(tmp_path):
    touch(tmp_path / "raw", "a.nii.gz", ".b.nii.gz", ".hidden/c.nii.gz", "labelsTr/a.nii.gz", "Segmentations/a.nii.gz")
    touch(tmp_path / "raw", "a_seg.nii.gz", "a_reconstruction.nii.gz")
    assert names(tmp_path / "raw") == ["raw__a"]


def test_outputs_of_earlier_runs_are_not_looked_into(tmp_path):
    touch(tmp_path / "raw", "a.nii.gz", "old/.prepared/x.json", "old/nifti/b.nii.gz", "new/nifti/c.nii.gz")
    assert names(tmp_path / "raw", skip=tmp_path / "raw" / "new") == ["raw__a"]
    with pytest.raises(InputError, match="earlier run"):
        find_candidates(tmp_path / "raw" / "old")


def test_one_file_is_a_source(tmp_path):
    touch(tmp_path / "raw", "a.nii.gz", "b.nii.gz")
    assert names(tmp_path / "raw" / "a.nii.gz") == ["a"]


def test_dicom_series_are_found_by_content(tmp_path):
    write_series(tmp_path / "raw" / "patient 7" / "series", STORED, suffix="")
    touch(tmp_path / "raw", "patient 7/DICOMDIR", "patient 7/report.pdf")
    (candidate,) = find_candidates(tmp_path / "raw").candidates
    assert (candidate.name, candidate.kind, len(candidate.files)) == ("raw__patient_7__series", "dicom", 9)
    assert candidate.source == str(tmp_path / "raw" / "patient 7" / "series")
    assert candidate.series.patient_id == "patient 7"


def test_two_series_in_one_folder_are_two_scans(tmp_path):
    write_series(tmp_path / "raw", STORED, SeriesInstanceUID="1.2.3")
    write_series(tmp_path / "raw", STORED, SeriesInstanceUID="1.2.4", suffix=".ima")
    found = names(tmp_path / "raw")
    assert len(set(found)) == 2
    assert all(name.startswith("raw-") for name in found)
    assert found == names(tmp_path / "raw")  # the same in the next run


def test_stacks_of_one_series_have_names_of_their_own(tmp_path):
    """A localizer and the slices often share the series UID."""
    write_series(tmp_path / "raw", STORED, SeriesInstanceUID="1.2.3")
    write_series(tmp_path / "raw", STORED[:3], SeriesInstanceUID="1.2.3", suffix=".ima")
    assert len(set(names(tmp_path / "raw"))) == 2


def test_metaimage_is_found_with_its_voxels(tmp_path):
    folder = touch(tmp_path / "raw", "1.3.6.raw", "seg-lungs/1.3.6.mhd")
    (folder / "1.3.6.mhd").write_text("NDims = 3\nElementDataFile = 1.3.6.raw\n")
    touch(folder, "broken.mhd")
    uid = "1.3.6.1.4.1.14519.5.2.1.6279"
    touch(folder, f"{uid}.nii.gz")
    found = find_candidates(folder)
    candidate, other = found.candidates
    assert (candidate.name, candidate.kind) == ("raw__1.3.6", "metaimage")
    assert (candidate.series_uid, other.series_uid) == ("", uid)
    assert candidate.files == (str(folder / "1.3.6.mhd"), str(folder / "1.3.6.raw"))
    assert found.refused == {str(folder / "broken.mhd"): "is not a MetaImage: it has no ElementDataFile"}


# ---- names ---------------------------------------------------------------------------------------------------------


def test_equal_names_in_different_folders_are_told_apart(tmp_path):
    touch(tmp_path, "HNSCC/img_1.nii.gz", "Colonography/img_1.nii.gz")
    assert names(tmp_path / "HNSCC", tmp_path / "Colonography") == ["Colonography__img_1", "HNSCC__img_1"]


def test_a_name_does_not_change_when_a_source_is_added(tmp_path):
    touch(tmp_path, "a/scan.nii.gz", "b/scan.nii.gz")
    assert set(names(tmp_path / "a")) < set(names(tmp_path / "a", tmp_path / "b"))


@pytest.mark.parametrize(
    "files", [("a b.nii.gz", "a_b.nii.gz"), ("a/b.nii.gz", "a__b.nii.gz"), ("x.nii", "x.nii.gz"), ("x.nii", "X.nii")]
)
def test_names_that_would_be_equal_get_a_checksum(tmp_path, files):
    touch(tmp_path / "raw", *files)
    found = names(tmp_path / "raw")
    assert len({name.casefold() for name in found}) == 2
    assert found == names(tmp_path / "raw")


def test_two_sources_of_one_name_are_told_apart(tmp_path):
    touch(tmp_path, "x/ct/scan.nii.gz", "y/ct/scan.nii.gz")
    assert len(set(names(tmp_path / "x" / "ct", tmp_path / "y" / "ct"))) == 2


def test_letters_of_any_language_stay(tmp_path):
    touch(tmp_path / "raw", "Müller, Jörg/肺 1.nii.gz")
    assert names(tmp_path / "raw") == ["raw__Müller__Jörg__肺_1"]


def test_long_paths_are_cut_and_stay_apart(tmp_path):
    touch(tmp_path / "raw", f"{'u' * 100}/{'v' * 100}/a.nii.gz", f"{'u' * 100}/{'v' * 100}/b.nii.gz")
    found = names(tmp_path / "raw")
    assert len(set(found)) == 2
    assert all(len(name.encode()) <= LONGEST_NAME for name in found)


# ---- links ---------------------------------------------------------------------------------------------------------


def test_links_are_followed_and_each_file_is_taken_once(tmp_path):
    touch(tmp_path / "store", "a.nii.gz")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "raw" / "z.nii.gz").symlink_to(tmp_path / "store" / "a.nii.gz")
    assert len(names(tmp_path / "raw")) == 1
    assert len(names(tmp_path / "raw", tmp_path / "store")) == 1


def test_loops_of_links_end(tmp_path):
    touch(tmp_path / "raw", "deep/a.nii.gz")
    (tmp_path / "raw" / "deep" / "up").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "self.nii.gz").symlink_to(tmp_path / "raw" / "self.nii.gz")
    found = find_candidates(tmp_path / "raw")
    assert [candidate.name for candidate in found.candidates] == ["raw__deep__a"]
    assert found.refused == {str(tmp_path / "raw" / "self.nii.gz"): "is a broken link"}


# ---- data lists ----------------------------------------------------------------------------------------------------


def test_a_data_list_tells_labels_patients_and_sections(tmp_path):
    folder = touch(tmp_path / "T", "im/a.nii.gz", "im/b.nii.gz", "im/c.nii.gz", "im/d.nii.gz", "truth/a.nii.gz")
    entry = {"image": "./im/a.nii.gz", "label": "./truth/a.nii.gz", "patient": 7}
    content = {"labels": {"0": "background", "1": "liver"}, "training": [entry]}
    content |= {"validation": ["im/b.nii.gz"], "test": ["im/c.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(content))
    found = find_candidates(folder)
    rows = {
        c.name: (os.path.relpath(c.label, folder) if c.label else "", c.patient, c.section) for c in found.candidates
    }
    assert rows == {
        "T__im__a": ("truth/a.nii.gz", "T/7", "training"),
        "T__im__b": ("", "", "validation"),
        "T__im__c": ("", "", "test"),
        "T__im__d": ("", "", ""),  # not in the list
    }
    assert found.labels == {"0": "background", "1": "liver"}


def test_label_names_that_contradict_are_not_taken_over(tmp_path):
    for name, organ in (("a", "liver"), ("b", "spleen")):
        folder = touch(tmp_path / name, "im/1.nii.gz")
        (folder / "dataset.json").write_text(json.dumps({"labels": {"1": organ}, "training": ["im/1.nii.gz"]}))
    found = find_candidates([tmp_path / "a", tmp_path / "b"])
    assert found.labels == {}
    assert "name the labels differently" in found.notes[0]


def test_btcv_layout_without_a_list_gives_labels(tmp_path):
    touch(tmp_path / "btcv", "RawData/Training/img/img0001.nii.gz", "RawData/Training/label/label0001.nii.gz")
    (candidate,) = find_candidates(tmp_path / "btcv").candidates
    assert candidate.label.endswith("label/label0001.nii.gz")


def test_a_scan_of_a_list_that_is_not_there_is_refused(tmp_path):
    folder = touch(tmp_path / "T", "im/a.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"training": ["im/a.nii.gz", "im/gone.nii.gz"]}))
    found = find_candidates(folder)
    assert len(found.candidates) == 1
    ((path, reason),) = found.refused.items()
    assert path.endswith("gone.nii.gz") and "dataset.json" in reason


def test_a_broken_list_is_refused_and_its_scans_are_taken(tmp_path):
    folder = touch(tmp_path / "T", "im/a.nii.gz", "labelsTr/a.nii.gz")
    (folder / "dataset.json").write_text('{"training": [')
    found = find_candidates(folder)
    assert [candidate.name for candidate in found.candidates] == ["T__im__a"]
    assert "not valid JSON" in found.refused[str(folder / "dataset.json")]


# ---- what cannot be read -------------------------------------------------------------------------------------------


def test_folders_and_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    touch(tmp_path / "raw", "a.nii.gz", "locked/b.nii.gz", "locked.bin")
    real_scandir, real_open = os.scandir, open

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    def locked_open(path, *arguments, **options):
        if str(path).endswith("locked.bin"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(scan_sources, "open", locked_open, raising=False)
    found = find_candidates(tmp_path / "raw")
    assert [candidate.name for candidate in found.candidates] == ["raw__a"]
    assert found.refused == {
        str(tmp_path / "raw" / "locked"): "cannot be read: Permission denied",
        str(tmp_path / "raw" / "locked.bin"): "cannot be read: Permission denied",
    }


def test_other_formats_are_refused_by_name(tmp_path):
    touch(tmp_path / "raw", "a.nii.gz", "b.nrrd", "c.mgz")
    refused = find_candidates(tmp_path / "raw").refused
    assert [Path(path).name for path in refused] == ["b.nrrd", "c.mgz"]
    assert all(".nii.gz" in reason for reason in refused.values())


def test_a_pipe_is_passed_by(tmp_path):
    touch(tmp_path / "raw", "a.nii.gz")
    os.mkfifo(tmp_path / "raw" / "pipe.nii.gz")
    assert names(tmp_path / "raw") == ["raw__a"]


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    touch(tmp_path / "raw", "a.nii.gz")
    try:
        Path(os.fsdecode(bytes(tmp_path / "raw") + b"/b\xff.nii.gz")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")
    found = find_candidates(tmp_path / "raw")
    assert [candidate.name for candidate in found.candidates] == ["raw__a"]
    assert "UTF-8" in str(found.refused)


@pytest.mark.parametrize("what", ["missing", "empty", "text"])
def test_a_source_without_scans_is_an_error(tmp_path, what):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "text")
    with pytest.raises(InputError, match=str(tmp_path / what)):
        find_candidates(tmp_path / what)


@pytest.mark.parametrize("source", [2023, [2023], None])
def test_a_source_that_is_no_path_is_an_error(source):
    with pytest.raises(InputError, match=r"--source .*(2023|None)"):
        find_candidates(source)


def test_a_folder_that_holds_an_output_is_named(tmp_path, caplog):
    touch(tmp_path / "raw", "a.nii.gz", "old/.prepared/x.json", "old/b.nii.gz")
    assert names(tmp_path / "raw") == ["raw__a"]
    assert str(tmp_path / "raw" / "old") in caplog.text and "earlier run" in caplog.text


@pytest.mark.parametrize("suffix", [".dcm", "", ".IMA"])
@pytest.mark.parametrize("size", [0, 100])
def test_slices_that_are_empty_or_cut_are_refused_and_so_is_their_series(tmp_path, suffix, size):
    broken = write_series(tmp_path / "raw" / "cut", STORED, suffix=suffix)[-1]
    broken.write_bytes(broken.read_bytes()[:size])
    write_series(tmp_path / "raw" / "whole", STORED, SeriesInstanceUID="1.2.3")
    touch(tmp_path / "raw" / "whole", "report.pdf", "LICENSE")
    (tmp_path / "raw" / "whole" / "done.txt").touch()
    found = find_candidates(tmp_path / "raw")
    assert list(found.refused) == [str(broken)]
    assert ("0 bytes" if size == 0 else "cut short") in found.refused[str(broken)]
    faults = {candidate.name: candidate.fault for candidate in found.candidates}
    assert faults["raw__whole"] == ""
    assert str(tmp_path / "raw" / "cut") in faults["raw__cut"] and "perhaps slices of it" in faults["raw__cut"]


@pytest.mark.parametrize(("pack", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_slice_that_is_compressed_is_named_so(tmp_path, pack, kind):
    packed = write_series(tmp_path / "raw", STORED)[2]
    packed.write_bytes(pack(packed.read_bytes()))
    found = find_candidates(tmp_path / "raw")
    assert found.refused == {str(packed): f"is compressed with {kind}: unpack it"}
    assert "perhaps slices of it" in found.candidates[0].fault


def test_a_list_beside_a_series_does_not_refuse_it(tmp_path):
    write_series(tmp_path / "raw", STORED)
    (tmp_path / "raw" / "dataset.json").write_text('{"training": ["gone.nii.gz"')
    found = find_candidates(tmp_path / "raw")
    assert len(found.refused) == 1 and found.candidates[0].fault == ""


def listing(folder: Path, **content) -> None:
    (folder / "dataset.json").write_text(json.dumps(content))


def test_of_several_sections_the_one_held_out_most_counts(tmp_path):
    folder = touch(tmp_path / "T", "im/a.nii.gz", "im/b.nii.gz", "im/c.nii.gz", "truth/b.nii.gz")
    known = {"image": "im/b.nii.gz", "label": "truth/b.nii.gz", "patient": "x"}
    listing(folder, test=["im/a.nii.gz", "im/b.nii.gz"], unlabeled=["im/a.nii.gz", known], training=["im/c.nii.gz"])
    listing(folder / "im", training=["a.nii.gz"], validation=["c.nii.gz"])
    found = find_candidates(folder)
    rows = {one.name: (one.section, os.path.basename(one.label), one.patient) for one in found.candidates}
    assert rows == {
        "T__im__a": ("test", "", ""),
        "T__im__b": ("test", "b.nii.gz", "T/x"),
        "T__im__c": ("validation", "", ""),
    }
    (note,) = found.notes
    assert "several sections" in note and "im/a.nii.gz" in note


def test_masks_that_are_passed_by_are_counted(tmp_path, caplog):
    touch(
        tmp_path / "raw", "a.nii.gz", "Segmentation 2/b.nii.gz", "Segmentation 2/sub/c.nii.gz", "x_seg.nii.gz", "d.zip"
    )
    touch(tmp_path / "raw", "Segmented CT/d.nii.gz")
    found = find_candidates(tmp_path / "raw")
    assert [one.name for one in found.candidates] == ["raw__Segmented_CT__d", "raw__a"] and found.refused == {}
    reasons = {Path(path).name: reason for path, reason in found.left_out.items()}
    assert reasons.keys() == {"Segmentation 2", "x_seg.nii.gz", "d.zip"}
    assert "2 files, such as" in reasons["Segmentation 2"] and "Segmentation 2/b.nii.gz" in reasons["Segmentation 2"]
    assert "3 files and folders are left out" in caplog.text


def test_listed_scans_outside_the_sources_are_refused(tmp_path):
    touch(tmp_path, "raw/a.nii.gz", "other/b.nii.gz", "raw/.hidden/c.nii.gz")
    listing(tmp_path / "raw", training=["a.nii.gz", "../other/b.nii.gz", ".hidden/c.nii.gz"])
    refused = find_candidates(tmp_path / "raw").refused
    assert "is outside the sources" in refused[str(tmp_path / "other" / "b.nii.gz")]
    assert "is hidden" in refused[str(tmp_path / "raw" / ".hidden" / "c.nii.gz")]
    assert len(find_candidates([tmp_path / "raw", tmp_path / "other"]).refused) == 1


def test_a_list_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    folder = touch(tmp_path / "T", "a.nii.gz")
    listing(folder, training=["a.nii.gz"])

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(scan_sources, "parse_data_list", denied)
    found = find_candidates(folder)
    assert len(found.candidates) == 1
    assert found.refused == {str(folder / "dataset.json"): "cannot be read: Permission denied"}


def test_a_label_that_is_not_there_is_not_carried_and_told(tmp_path):
    folder = touch(tmp_path / "T", "a.nii.gz")
    listing(folder, training=[{"image": "a.nii.gz", "label": "truth/a.nii.gz"}])
    found = find_candidates(folder)
    (candidate,) = found.candidates
    assert candidate.label == "" and "truth/a.nii.gz does not exist" in candidate.remark
    assert "1 label of" in found.notes[0]


def test_patients_of_two_lists_are_not_one_unless_dicom_says_so(tmp_path):
    for name in ("x/T", "y/T", "z"):
        listing(touch(tmp_path / name, "a.nii.gz"), training=[{"image": "a.nii.gz", "patient": 1}])
        listing(touch(tmp_path / name / "b", "b.nii.gz"), training=[{"image": "b.nii.gz", "patient": "P"}])
    write_series(tmp_path / "dicom", STORED, PatientID="P")
    found = find_candidates([tmp_path / "x" / "T", tmp_path / "y" / "T", tmp_path / "z", tmp_path / "dicom"])
    patients = [one.patient for one in found.candidates if one.kind == "nifti"]
    assert len(set(patients)) == 4 and patients.count("P") == 3


def test_channels_of_one_image_are_refused(tmp_path):
    listing(touch(tmp_path / "T", "x.nii.gz", "y.nii.gz"), training=[{"image": ["x.nii.gz", "y.nii.gz"]}])
    assert all("one of 2 channels" in candidate.fault for candidate in find_candidates(tmp_path / "T").candidates)


# ---- masks beside images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask"), [("volume-0.nii.gz", "segmentation-0.nii.gz"), ("p1.nii.gz", "p1_label.nii.gz")]
)
def test_pairs_in_one_folder_are_scans_with_labels(tmp_path, image, mask):
    found = find_candidates(touch(tmp_path / "raw", image, mask))
    assert [(Path(one.source).name, Path(one.label).name) for one in found.candidates] == [(image, mask)]
    assert found.left_out == found.refused == {}


def test_several_masks_of_a_case_are_left_out_and_refuse_nothing(tmp_path):
    folder = touch(tmp_path / "raw", *[f"P01/{name}.nii.gz" for name in ("ct", "liver_mask", "spleen_mask")])
    touch(folder, *[f"P02/P02_{name}.nii.gz" for name in ("t1", "flair", "seg2")])
    found = find_candidates(folder)
    assert [one.name for one in found.candidates] == ["raw__P01__ct", "raw__P02__P02_flair", "raw__P02__P02_t1"]
    assert found.refused == {}
    assert {Path(path).name for path in found.left_out} == {
        "liver_mask.nii.gz",
        "spleen_mask.nii.gz",
        "P02_seg2.nii.gz",
    }
    (note,) = found.notes
    assert "P01 should hold one case" in note and "dataset.json:" not in note


def test_folders_that_cannot_be_told_apart_do_not_refuse_their_scans(tmp_path):
    found = find_candidates(touch(tmp_path / "raw", "images/a.nii.gz", "labels/a.nii.gz", "masks/a.nii.gz"))
    assert [one.name for one in found.candidates] == ["raw__images__a"] and found.refused == {}
    assert {Path(path).name for path in found.left_out} == {"labels", "masks"}


def test_files_named_like_masks_without_an_image_are_scans(tmp_path):
    assert names(touch(tmp_path / "raw", "x/mask_study_1.nii.gz", "y/ct.nii.gz")) == [
        "raw__x__mask_study_1",
        "raw__y__ct",
    ]


def test_masks_of_structures_are_no_pairs(tmp_path):
    found = find_candidates(
        touch(tmp_path / "raw", "ct.nii.gz", *[f"segmentations/{n}.nii.gz" for n in ("body", "body_mask", "liver")])
    )
    assert [one.name for one in found.candidates] == ["raw__ct"]


@pytest.mark.parametrize(
    ("scan", "masks"),
    [
        ("case_1/imaging.nii.gz", "case_1/instances/kidney_instance-1_annotation-1.nii.gz"),
        ("ImagePart1/Case_00001_0000.nii.gz", "FLARE_Mask/Case_00001.nii.gz"),
        ("Pancreas-CT/PANCREAS_0001.nii.gz", "TCIA_pancreas_labels-02-05-2017/label0001.nii.gz"),
    ],
)
def test_masks_of_public_collections_are_left_out_by_name(tmp_path, scan, masks):
    found = find_candidates(touch(tmp_path / "raw", scan, masks))
    assert [one.source for one in found.candidates] == [str(tmp_path / "raw" / scan)]
    assert [masks.startswith(os.path.relpath(path, tmp_path / "raw")) for path in found.left_out] == [True]


def test_a_case_folder_that_ends_in_a_mask_word_keeps_its_scan(tmp_path):
    touch(tmp_path / "raw", "P01_seg/ct.nii.gz", "P02 mask/a.nii.gz", "P02 mask/a_liver_label.nii.gz")
    assert names(tmp_path / "raw") == ["raw__P01_seg__ct", "raw__P02_mask__a"]


@pytest.mark.parametrize("name", ["a.nii.gz", "a.dcm", "a.mhd"])
def test_a_device_or_pipe_that_is_named_like_a_scan_is_refused(tmp_path, name):
    touch(tmp_path / "raw", "b.nii.gz")
    os.symlink(os.devnull, tmp_path / "raw" / name)
    os.mkfifo(tmp_path / "raw" / "control")
    found = find_candidates(tmp_path / "raw")
    assert list(found.refused) == [str(tmp_path / "raw" / name)] and len(found.candidates) == 1
    assert "no regular file" in found.refused[str(tmp_path / "raw" / name)]
