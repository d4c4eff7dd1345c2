# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import SaveImaged

from bundles.common.cases.failures import Failure, Failures, reason_of
from bundles.common.errors import InputError


def test_failures_are_told_and_give_status_3(tmp_path, caplog):
    failures = Failures(tmp_path)
    failures.report(2)
    failures.exit_status()
    assert not failures.file.exists()
    failures.add("a.nii.gz", "mask", InputError("first\nsecond"))
    failures.add("a.nii.gz", "picture", "no room")
    caplog.clear()
    failures.report(2)
    (summary,) = caplog.messages
    assert summary.startswith("1 of 2 scans are done; 1 scan is not, or lacks something (")
    assert "a.nii.gz: no mask: first second" in summary and "a.nii.gz: no picture: no room" in summary
    with pytest.raises(SystemExit) as exit:
        failures.exit_status()
    assert exit.value.code == 3
    assert failures.file.read_text().splitlines() == [
        "scan,missing,reason",
        "a.nii.gz,mask,first second",
        "a.nii.gz,picture,no room",
    ]


def test_a_run_without_failures_removes_the_table_of_an_earlier_one(tmp_path):
    Failures(tmp_path).add("a.nii.gz", "mask", "damaged")
    again = Failures(tmp_path)
    assert again.earlier() == {"a.nii.gz"}
    again.report(1)
    assert not again.file.exists() and again.earlier() == set()


def test_a_stopped_run_forgets_no_failure_of_an_earlier_one(tmp_path):
    first = Failures(tmp_path)
    for scan in "abc":
        first.add(scan, "DICOM SEG", "no room")
    second = Failures(tmp_path)
    second.earlier()
    second.add("a", "picture", "damaged")  # and is stopped here
    third = Failures(tmp_path)
    assert third.earlier() == {"a", "b", "c"}
    third.report(3)
    assert third.earlier() == set()


def test_a_table_that_a_spreadsheet_saved_is_read_or_refused_but_not_lost(tmp_path):
    failures = Failures(tmp_path)
    failures.add("ä.nii.gz", "DICOM SEG", "no room")
    text = failures.file.read_text(encoding="utf-8")
    failures.file.write_text(text, encoding="utf-8-sig")
    assert Failures(tmp_path, resume=True).earlier() == {"ä.nii.gz"}
    for other, encoding in ((text.replace(",", ";"), "utf-8"), (text, "cp1252")):
        failures.file.write_text(other, encoding=encoding)
        with pytest.raises(InputError, match=r"failed.csv is not the table .*scan,missing,reason.*spreadsheet"):
            Failures(tmp_path, resume=True)
        assert failures.file.read_text(encoding=encoding) == other


def test_a_run_in_which_all_scans_fail_has_no_result(tmp_path):
    failures = Failures(tmp_path)
    for name in ("a", "b"):
        failures.add(name, "mask", "damaged")
    with pytest.raises(InputError, match=r"None of the 2 scans has a result:\n  a: no mask: damaged\n  b: no mask"):
        failures.report(2)
    with pytest.raises(InputError, match="None of the 2 scans"):
        failures.refuse_if_all([1, 2])
    failures.refuse_if_all([1, 2, 3])
    pictures = Failures(tmp_path)
    pictures.add("a", "picture", "no font")
    pictures.report(1)  # it has a mask


def test_a_long_list_of_failures_is_cut(tmp_path, caplog):
    failures = Failures(tmp_path)
    for number in range(25):
        failures.add(f"scan{number}", "mask", "damaged")
    caplog.clear()
    failures.report(30)
    assert caplog.messages[0].startswith("5 of 30") and caplog.messages[0].endswith(f"and 5 more in {failures.file}")
    assert len(failures.earlier()) == 25 and failures.all()[0] == Failure("scan0", "mask", "damaged")


def test_what_a_writer_of_monai_raised_is_told_not_its_advice(tmp_path):
    class Writer(NibabelWriter):
        def write(self, *_, **__):
            raise OSError(36, "File name too long", "x_seg.nii.gz")

    item = {"pred": MetaTensor(torch.zeros(1, 2, 2, 2), meta={"filename_or_obj": "x.nii.gz"})}
    with pytest.raises(RuntimeError, match="install") as raised:
        SaveImaged(keys="pred", writer=Writer, output_dir=tmp_path, print_log=False)(item)
    assert reason_of(raised.value) == "OSError: [Errno 36] File name too long: 'x_seg.nii.gz'"
