# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest

from bundles.common.data.case_names import CaseFiles, case_name, case_names, names_of


@pytest.mark.parametrize(
    ("file", "name"),
    [("a/b/img1.nii.gz", "img1"), ("img2.nii", "img2"), ("/x/ct.v2.nii.gz", "ct.v2"), ("s.nrrd", "s.nrrd")],
)
def test_case_name_is_the_file_name(file, name):
    assert case_name(file) == name


def test_long_names_leave_room_for_the_results_of_a_case():
    long, other = (case_name(f"/d/{'ä' * 120}{end}.nii.gz") for end in ("a", "b"))
    assert (
        long != other and long.startswith("ä" * 95) and len(f".12345678.{long}_reconstruction.nii.gz".encode()) <= 255
    )
    assert case_name("y" * 200 + ".nii") == "y" * 200 and len(case_name("y" * 201 + ".nii")) == 200


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["d/a.nii.gz", "d/b.nii", "e/c.nii"], ["a", "b", "c"]),
        (["/d/s1/ct.nii.gz", "/d/s2/ct.nii.gz", "/d/s3/mr.nii.gz"], ["s1/ct", "s2/ct", "mr"]),
        (["/d/s1/scans/ct.nii.gz", "/d/s2/scans/ct.nii.gz"], ["s1/scans/ct", "s2/scans/ct"]),
        (["/a/ct.nii", "/b/a/ct.nii", "/b/c/ct.nii"], ["a/ct", "b/a/ct", "b/c/ct"]),
        (["/d/ct.nii", "/d/ct.nii.gz"], ["ct.nii", "ct.nii.gz"]),
        (["/d/ct.nii", "/d/ct.nii.gz", "/s1/ct.nii.gz"], ["ct.nii", "ct.nii.gz", "ct"]),
        (["/d/ct.NII.GZ", "/s1/ct.nii.gz"], ["d/ct", "s1/ct"]),
        (["/d/ct.nii", "/d/ct.nii"], ["ct", "ct"]),
        (["../x/ct.nii", "../y/ct.nii"], ["x/ct", "y/ct"]),
    ],
)
def test_equal_names_get_as_much_of_the_folder_as_tells_them_apart(files, names):
    assert [case_names(files)[file] for file in files] == names
    assert [case_names(files[::-1])[file] for file in files] == names


def test_files_of_cases_have_their_names_and_folders(tmp_path):
    files = CaseFiles(tmp_path / "out", "seg")
    assert files.filename(subject="/d/a.v1.NII.GZ", idx=None) == str(tmp_path / "out" / "a.v1_seg.nii.gz")
    files.use(case_names(["/d/s1/ct.nii", "/d/s2/ct.nii"]))
    assert files.filename(subject="/d/s2/ct.nii", idx=None) == str(tmp_path / "out" / "s2" / "ct_seg.nii.gz")
    assert (tmp_path / "out" / "s2").is_dir()


def test_items_are_named_by_their_first_image(tmp_path):
    cases = [{"image": "/d/a/ct.nii.gz"}, {"image": ["/d/b/ct.nii.gz", "/d/b/pet.nii.gz"]}]
    names = names_of(cases)
    assert names == {"/d/a/ct.nii.gz": "a/ct", "/d/b/ct.nii.gz": "b/ct"}
    files = CaseFiles(tmp_path, "seg", names)
    assert files.filename("/d/b/ct.nii.gz") == str(tmp_path / "b" / "ct_seg.nii.gz")
