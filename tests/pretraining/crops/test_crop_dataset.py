# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import Compose

from bundles.common.errors import InputError
from bundles.pretraining.crops.body_crops import RandBodyCropsd
from bundles.pretraining.crops.crop_dataset import crop_dataset
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
