# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import errno
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from bundles.common.cases import case_by_case
from bundles.common.cases.case_by_case import CaseDataset, CaseEvaluator, collate_case, good_cases
from bundles.common.cases.case_handler import CaseHandler
from bundles.common.cases.failures import Failures
from bundles.common.data.case_names import case_name
from bundles.common.errors import InputError


def scan(folder: Path, name: str, value: float = 1.0) -> dict[str, str]:
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), value, np.float32), np.eye(4)), path)
    return {"image": str(path)}


class Written(CaseHandler):
    """Collects the largest value of each prediction."""

    product = "number"

    def __init__(self, output_dir: Path, **options) -> None:
        super().__init__(output_dir, **options)
        self.values: dict[str, float] = {}

    def case_completed(self, item, file) -> None:
        value = float(self.label_map(item, self.pred_key, file).max())
        if value == 4:
            raise AttributeError("'str' object has no attribute 'name'")
        self.values[case_name(file)] = value


def network_that_fails_on(value: float):
    def inferer(inputs, network):
        if inputs.max() == value:
            raise MemoryError
        return inputs

    return inferer


def run(cases, folder, failures, *, handlers=(), num_workers=0):
    transforms = Compose([LoadImaged("image", image_only=True), EnsureChannelFirstd("image")])
    CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(
            CaseDataset(cases, transforms), batch_size=1, num_workers=num_workers, collate_fn=collate_case
        ),
        network=torch.nn.Identity(),
        inferer=network_that_fails_on(3),
        val_handlers=list(handlers),
        failures=failures,
    ).run()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_case_that_fails_anywhere_costs_no_other(tmp_path, num_workers):
    cases = [scan(tmp_path, name, value) for value, name in enumerate(("zero", "one", "two", "three", "four", "five"))]
    Path(cases[1]["image"]).write_bytes(b"no scan")
    failures = Failures(tmp_path)
    plain = Written(tmp_path)
    plain.case_completed = lambda item, file: plain.values.update({case_name(file): 1.0})
    guarded = Written(tmp_path, failures=failures)
    run(cases, tmp_path, failures, handlers=[guarded, plain], num_workers=num_workers)
    assert guarded.values == {"zero": 0, "two": 2, "five": 5}
    assert set(plain.values) == {"zero", "two", "four", "five"}  # the other handlers go on
    found = {case_name(failure.scan): (failure.missing, failure.reason) for failure in failures.all()}
    assert set(found) == {"one", "three", "four"}
    assert found["three"] == ("mask", "it does not fit into memory")
    assert found["four"] == ("number", "AttributeError: 'str' object has no attribute 'name'")
    assert found["one"][0] == "mask" and "one.nii.gz" in found["one"][1]
    assert failures.earlier() == {cases[number]["image"] for number in (1, 3, 4)}


def test_each_case_is_told_with_its_number_and_the_time_that_is_left(tmp_path, monkeypatch, caplog):
    cases = [scan(tmp_path, name) for name in ("a", "b", "c")]
    seconds = iter((0.0, 1.0, 30.0, 80.0))  # the start, and the begin of each case
    monkeypatch.setattr(case_by_case.time, "monotonic", lambda: next(seconds))
    with caplog.at_level(logging.INFO, logger=case_by_case.__name__):
        run(cases, tmp_path, Failures(tmp_path))
    files = [case["image"] for case in cases]
    told = [record.getMessage() for record in caplog.records if record.name == case_by_case.__name__]
    assert told == [
        f"scan 1 of 3: {files[0]}",
        f"scan 2 of 3: {files[1]}, about 60 s left",
        f"scan 3 of 3: {files[2]}, about 40 s left",
    ]


def test_without_failures_an_error_ends_the_run(tmp_path):
    handler = Written(tmp_path)
    with pytest.raises(AttributeError):
        run([scan(tmp_path, "four", 4)], tmp_path, Failures(tmp_path), handlers=[handler])


def test_a_full_disk_ends_the_run(tmp_path):
    failures = Failures(tmp_path)
    handler = Written(tmp_path, failures=failures)

    def full(item, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/results/a_seg.nii.gz")
        except OSError as error:  # as MONAI's transforms wrap errors
            raise RuntimeError("applying transform") from error

    handler.case_completed = full
    with pytest.raises(InputError, match=r"/results/a_seg\.nii\.gz cannot be written: No space left"):
        run([scan(tmp_path, "a"), scan(tmp_path, "b")], tmp_path, failures, handlers=[handler])


def test_a_batch_of_several_cases_is_refused(tmp_path):
    dataset = CaseDataset([scan(tmp_path, "a"), scan(tmp_path, "b")], LoadImaged("image", image_only=True))
    with pytest.raises(ValueError, match="2 cases in one batch"):
        collate_case([dataset[0], dataset[1]])


@pytest.mark.parametrize(
    ("check_data", "kept"), [("full", ["good"]), ("headers", ["good", "nan"]), ("none", ["empty", "good", "nan"])]
)
def test_bad_cases_are_left_out(tmp_path, check_data, kept):
    cases = [scan(tmp_path, "empty"), scan(tmp_path, "good"), scan(tmp_path, "nan", np.nan)]
    Path(cases[0]["image"]).write_bytes(b"")
    failures = Failures(tmp_path)
    good = good_cases(cases, failures=failures, check_data=check_data, channels=1, hounsfield=False)
    assert [case_name(case["image"]) for case in good] == kept
    reasons = {case_name(failure.scan): failure.reason for failure in failures.all()}
    assert set(reasons) == {"empty", "good", "nan"} - set(kept)
    assert "0 bytes" in reasons.get("empty", "0 bytes") and "NaN" in reasons.get("nan", "NaN")


def test_labels_are_checked_as_well(tmp_path):
    cases = [scan(tmp_path, "a"), scan(tmp_path, "b")]
    for case, label in zip(cases, (1, 255), strict=True):
        case["label"] = scan(tmp_path, f"label{label}", label)["image"]
    options = {"check_data": "full", "channels": 1, "hounsfield": False, "labels": ["0", "1"]}
    failures = Failures(tmp_path)
    assert good_cases(cases, failures=failures, **options, missing="score") == cases[:1]
    assert [(failure.scan, failure.missing) for failure in failures.all()] == [(cases[1]["image"], "score")]
    assert good_cases(cases, failures=Failures(tmp_path), **options, ignore_label=255) == cases


def test_an_unknown_check_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"check_data.*voxels"):
        good_cases([], failures=Failures(tmp_path), check_data="voxels", channels=1, hounsfield=False)
