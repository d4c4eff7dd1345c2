# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Every volume of the real data has a verdict: CT in HU is used regardless of its padding, MR is not."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import CropForeground

from bundles.pretraining.crops.patch_store import StoredScan

from ..common.scans.raw_scans import contents, ras, read_list
from ..workflows.command_line import run_bundle
from .test_real_scans import DATA

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "openkbp").is_dir(), reason="no real scans here: set REALDATA"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    run = run_bundle("swin_unetr_pretrain", "prepare.yaml", source=DATA, dataset_dir=folder)
    assert run.returncode == 3, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def rows(out) -> list[dict]:
    with open(out / "audit.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def folder_of(path: str) -> str:
    return Path(path).relative_to(DATA).parts[0]


def test_every_volume_has_its_row_and_its_verdict(rows):
    on_disk = Counter(folder_of(path) for path in DATA.glob("*/images*/*.nii.gz"))
    assert Counter(folder_of(row["source"]) for row in rows) == on_disk
    verdicts = {
        folder: Counter(row["verdict"] for row in rows if folder_of(row["source"]) == folder) for folder in on_disk
    }
    assert verdicts == {
        "Task04_Hippocampus": {"left_out": on_disk["Task04_Hippocampus"]},
        "openkbp": {"used": on_disk["openkbp"]},
        "abdomen_ct": {"used": on_disk["abdomen_ct"]},
        "ct_unlabelled": {"used": on_disk["ct_unlabelled"]},
    }
    assert all("not CT" in row["reason"] for row in rows if row["verdict"] == "left_out")


def test_stored_voxels_and_boxes_are_those_of_the_files(out, rows):
    used = [row for row in rows if row["verdict"] == "used"]
    for row in [row for row in used if folder_of(row["source"]) != "openkbp"] + used[3:200:40]:
        stored, (voxels, affine) = StoredScan(out / "store" / f"{row['name']}.b2nd"), ras(Path(row["source"]))
        np.testing.assert_array_equal(stored.read((slice(None),) * 3), voxels)
        np.testing.assert_allclose(stored.affine, affine, atol=1e-4)
        crop = CropForeground(select_fn=lambda image: image > -500, allow_smaller=True, return_coords=True)
        _, start, end = crop(voxels[None].astype(np.float32))
        assert stored.body_box == [[int(s), int(e)] for s, e in zip(start, end, strict=True)]


def test_sections_and_labels_of_the_sources_are_kept(out):
    content = read_list(out)
    assert len(content["validation"]) == 32
    assert all("openkbp" in entry["image"] and nib.load(entry["label"]).shape for entry in content["validation"])


def test_a_second_run_changes_nothing(out):
    before = contents(out)
    run = run_bundle("swin_unetr_pretrain", "prepare.yaml", source=DATA, dataset_dir=out)
    assert run.returncode == 3
    assert contents(out) == before
