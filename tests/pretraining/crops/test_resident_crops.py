# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Crops of a store on the device are those of the store to the bit, whatever the volumes, and only if it fits."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import DataLoader

from bundles.common.data.seeded_crops import DrawSampler
from bundles.pretraining.crops import resident_crops
from bundles.pretraining.crops.body_crops import RandBodyCropsd
from bundles.pretraining.crops.crop_dataset import whole_scan
from bundles.pretraining.crops.patch_store import write_scan
from bundles.pretraining.crops.resident_crops import ResidentCrops, kept_on_device
from bundles.pretraining.crops.stored_crops import StoredCrops

ROI = (16, 16, 12)
WINDOW = (-1000.0, 1000.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Scans larger and smaller than a crop, one of them nearly all air, with tissue outside of the body box."""
    folder, random = tmp_path_factory.mktemp("store"), np.random.default_rng(0)
    for i, shape in enumerate([(40, 36, 30), (40, 36, 9), (9, 10, 7), (44, 40, 34)]):
        voxels = random.integers(-1024, -900, shape).astype(np.int16)
        tissue = tuple(slice(0, 20 if i == 3 else size - 3) for size in shape)
        voxels[tissue] = random.integers(-700, 900, voxels[tissue].shape)
        box = [[0, size - 1] for size in shape]
        write_scan(folder / f"{i}.b2nd", voxels=voxels, affine=np.diag([0.8, 0.8, 2.5, 1]), body_box=box)
    return [{"image": str(folder / f"{i}.b2nd")} for i in range(4)]


def stored(store, *, threshold=0.25, seed=3, **options):
    cropping = RandBodyCropsd("image", roi_size=ROI, num_samples=2, threshold=threshold, min_body=0.1)
    return StoredCrops(data=store, cropping=cropping, hu_window=WINDOW, seed=seed, **options)


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"threshold": -0.1}, {"threshold": 1.5}])
def test_crops_are_those_of_the_store_to_the_bit(store, options):
    plain = stored(store, **options)
    resident = ResidentCrops(stored(store, **options), device="cpu")
    assert len(resident) == len(plain) == 4
    redrawn = set()
    for draw in range(40):
        assert resident.volume_of(draw) == plain.volume_of(draw)
        for one, other in zip(resident[draw], plain[draw], strict=True):
            assert one.keys() == other.keys() and one["image"].dtype == torch.int16
            assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in other)
            redrawn.add(one["redrawn"])
    assert len(redrawn) > 2 or options.get("threshold") is not None
    assert all(torch.equal(a, b) for a, b in zip(whole_scan(resident, 1), whole_scan(plain, 1), strict=True))


def test_batches_are_new_memory_and_leave_the_scans_as_they_are(store):
    resident = ResidentCrops(stored(store), device="cpu")
    before = [voxels.clone() for voxels in resident.voxels]
    for batch in DataLoader(resident, sampler=DrawSampler(iterations=3, batch_size=2), batch_size=2):
        assert batch["image"].shape == (4, 1, *ROI)
        batch["image"].zero_()
    assert all(torch.equal(a, b) for a, b in zip(resident.voxels, before, strict=True))


def test_reading_ends_with_the_start(store, monkeypatch):
    resident = ResidentCrops(stored(store), device="cpu")
    monkeypatch.setattr(resident.stored.scans[0].__class__, "read", lambda *_: pytest.fail("read from the disk"))
    assert len(resident[0]) == 2


def test_only_a_store_that_fits_the_share_is_kept_and_the_log_says_how_much(store, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    voxels = 39 * 35 * 29 + 39 * 35 * 12 + 16 * 16 * 12 + 43 * 39 * 33
    monkeypatch.setattr(resident_crops, "free_memory", lambda device: 4 * 2 * voxels)
    kept = kept_on_device(stored(store), device="cpu", share=0.25)
    assert isinstance(kept, ResidentCrops)
    assert f"4 scans of the store kept on cpu: {2 * voxels / 2**20:.1f} MiB, 25% of its free memory" in caplog.text
    plain = stored(store)
    assert kept_on_device(plain, device="cpu", share=0.2499) is plain
    assert "more than the share 0.2499 (--store_on_device) of the 0.9 MiB that are free on cpu" in caplog.text


def test_the_free_memory_of_the_host_is_some_of_it():
    assert 2**20 < resident_crops.free_memory("cpu") < 2**50
