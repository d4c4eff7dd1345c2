# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import shlex

import numpy as np
import pytest
import torch
from monai.transforms import Compose

from bundles.common.errors import InputError
from bundles.pretraining.crops.body_crops import RandBodyCropsd
from bundles.pretraining.crops.crop_dataset import crop_dataset, cure_of_slow_loading
from bundles.pretraining.crops.patch_store import write_scan
from bundles.pretraining.crops.stored_crops import StoredCrops


def crops(path, **changed):
    options = {"hu_window": [-1000.0, 1000.0], "foreground_hu": -500.0, "spacing": None, "seed": 0, **changed}
    return crop_dataset(
        **{"data": "store", "scans": [{"image": str(path)}], "preprocessing": Compose([]), **options},
        cropping=RandBodyCropsd("image", roi_size=[8, 8, 8], num_samples=1, threshold=0.25, min_body=0.0),
    )


@pytest.fixture
def scan(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16)
    details = {"foreground_hu": -500.0, "spacing": [1.5, 1.5, 2.0]}
    write_scan(tmp_path / "a.b2nd", voxels=voxels, affine=np.eye(4), body_box=[[0, 20]] * 3, details=details)
    return tmp_path / "a.b2nd"


def test_a_store_that_was_prepared_alike_is_read(scan):
    dataset = crops(scan, spacing=(1.5, 1.5, 2.0))
    assert isinstance(dataset, StoredCrops)
    assert dataset[0][0]["image"].dtype == torch.int16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, r"a\.b2nd was prepared with spacing \[1\.5, 1\.5, 2\.0\], but this run has None"),
        (
            {"spacing": [1.5, 1.5, 2.0], "foreground_hu": -400.0},
            r"prepared with foreground_hu -500\.0, but this run has -400",
        ),
        ({"data": "zarr"}, "--data 'zarr' is not one of nifti, store"),
    ],
)
def test_a_store_that_was_prepared_otherwise_is_refused(scan, change, words):
    with pytest.raises(InputError, match=words):
        crops(scan, **change)


def test_slow_loading_is_cured_by_a_store_whose_command_is_ready_to_copy(monkeypatch):
    run = {"dataset_dir": ["/data/a b", "/data/c"], "volumes": 30, "cache_num": 8, "num_workers": 2}
    words = ["x/monai/bundle/__main__.py", "run", "--config_file", "configs/train.yaml"]
    monkeypatch.setattr("sys.argv", words)
    before, command, after = cure_of_slow_loading(data="nifti", **run).splitlines()
    assert before == "Decode the scans once:"
    assert shlex.split(command)[4:] == [
        *("--config_file", "configs/prepare.yaml"),
        *("--source", "['/data/a b', '/data/c']", "--dataset_dir", "PREPARED"),
    ]
    assert after.startswith(
        "then train with --data store --dataset_dir PREPARED. Keep all volumes in memory (--cache_num 30,"
    )
    monkeypatch.setattr("sys.argv", ["python"])  # not started by the bundle runner
    assert cure_of_slow_loading(data="nifti", **run).startswith("Decode the scans once with configs/prepare.yaml, then")
    assert cure_of_slow_loading(data="store", **run) == "Use more loading processes (--num_workers, now 2)."
