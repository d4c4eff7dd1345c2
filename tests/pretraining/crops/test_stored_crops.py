# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Crops from stored scans are, to the bit, the crops that the scans themselves give by way of the preprocessing."""

from __future__ import annotations

import tracemalloc
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
)

from bundles.common.data.seeded_crops import DrawSampler, SeededCrops
from bundles.common.errors import InputError
from bundles.pretraining.crops.body_crops import RandBodyCropsd
from bundles.pretraining.crops.crop_dataset import whole_scan
from bundles.pretraining.crops.hu_window import intensities
from bundles.pretraining.crops.patch_store import write_scan
from bundles.pretraining.crops.stored_crops import StoredCrops

ROI = (16, 16, 12)
OFFICIAL = (-1000.0, 1000.0, -500.0)  # window and foreground
AWKWARD = (-175.3, 250.7, -83.1)  # none of them, nor their quotients, a binary fraction
COUNTS = ("draw", "padded", "redrawn", "airy")


def cropping(window=OFFICIAL, **options):
    low, high, foreground = window
    threshold = (foreground - low) / (high - low)
    return RandBodyCropsd(
        "image", **{"roi_size": ROI, "num_samples": 2, "threshold": threshold, "min_body": 0.01, **options}
    )


def air_with(*blocks, shape, seed=0):
    """Noisy air with blocks of tissue, some of it beyond either end of the windows."""
    random = np.random.default_rng(seed)
    hu = random.integers(-1024, -900, size=shape)
    for block in blocks:
        hu[block] = random.integers(-1500, 1500, size=hu[block].shape)
    return hu.astype(np.int16)


def volumes():
    """Voxels and the directions of their axes: larger and smaller than the ROI, and one that is nearly all air."""
    inside = (slice(3, -4), slice(2, -2), slice(5, -3))
    return {
        "ras": (air_with(inside, shape=(40, 36, 30), seed=1), "RAS"),
        "lps": (air_with(inside, shape=(33, 30, 40), seed=2), "LPS"),
        "pir": (air_with(inside, shape=(28, 45, 31), seed=3), "PIR"),
        "thin": (air_with(inside, shape=(40, 36, 13), seed=4), "LAS"),
        "tiny": (air_with((), shape=(9, 10, 7), seed=5), "SRA"),
        "airy": (air_with((slice(0, 7),) * 3, (slice(-7, None),) * 3, shape=(40, 40, 34), seed=6), "LPI"),
    }


def write(folder, window=OFFICIAL, made=None):
    """The same volumes as NIfTI files and as stored scans, by nibabel and NumPy alone."""
    scans, stored = [], []
    for name, (voxels, axcodes) in (made or volumes()).items():
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(axcodes)):
            affine[int(world), axis] = sign * (0.8, 0.8, 2.5)[axis]
        image = nib.Nifti1Image(voxels, affine)
        assert "".join(nib.aff2axcodes(image.affine)) == axcodes
        nib.save(image, folder / f"{name}.nii.gz")
        image = nib.as_closest_canonical(image)
        ras = np.asarray(image.dataobj)
        body = np.argwhere(ras > window[2])
        box = np.stack([body.min(axis=0), body.max(axis=0) + 1], axis=1) if len(body) else np.zeros((3, 2))
        write_scan(folder / f"{name}.b2nd", voxels=ras, affine=image.affine, body_box=box)
        scans.append({"image": str(folder / f"{name}.nii.gz")})
        stored.append({"image": str(folder / f"{name}.b2nd")})
    return scans, stored


def from_scans(scans, *, window=OFFICIAL, seed=0, shuffle=True, **options):
    """As train.yaml has it."""
    preprocessing = Compose(
        [
            LoadImaged("image", image_only=True),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            CropForegroundd(
                "image", source_key="image", select_fn=partial(torch.gt, other=window[2]), allow_smaller=True
            ),
            ScaleIntensityRanged("image", a_min=window[0], a_max=window[1], b_min=0.0, b_max=1.0, clip=True),
        ]
    )
    return SeededCrops(
        data=scans,
        preprocessing=preprocessing,
        augmentation=cropping(window, **options),
        seed=seed,
        cache_num=len(scans),
        shuffle=shuffle,
    )


def from_store(stored, *, window=OFFICIAL, seed=0, shuffle=True, **options):
    return StoredCrops(
        data=stored, cropping=cropping(window, **options), hu_window=list(window[:2]), seed=seed, shuffle=shuffle
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stored"))[1]


@pytest.mark.parametrize(("window", "shuffle"), [(OFFICIAL, True), (AWKWARD, True), (OFFICIAL, False)])
def test_crops_equal_those_of_the_scans_to_the_bit(tmp_path, window, shuffle):
    scans, stored = write(tmp_path, window)
    slow = from_scans(scans, window=window, seed=7, shuffle=shuffle)
    fast = from_store(stored, window=window, seed=7, shuffle=shuffle)
    assert len(fast) == len(slow) == 6
    seen = {name: set() for name in COUNTS[1:]}
    for draw in range(90):
        assert fast.volume_of(draw) == slow.volume_of(draw)
        ours, theirs = fast[draw], slow[draw]
        assert len(ours) == len(theirs) == 2
        for one, other in zip(ours, theirs, strict=True):
            assert one["image"].dtype == torch.int16 and type(one["image"]) is torch.Tensor
            assert set(one) == {"image", "affine", *COUNTS}
            assert one["affine"].dtype == other["affine"].dtype == torch.float64
            torch.testing.assert_close(one["affine"], other["affine"], rtol=0, atol=1e-5)
            assert one["image"].shape == (1, *ROI)
            assert torch.equal(intensities(one["image"], window[:2]), other["image"])
            assert all(one[name] == other[name] for name in COUNTS)
            for name, values in seen.items():
                values.add(one[name])
    assert seen["padded"] == {0, 1} and len(seen["redrawn"]) > 4 and seen["airy"] == {0, 1}


def test_a_whole_scan_is_the_same_from_either(tmp_path):
    scans, stored = write(tmp_path)
    slow, fast = from_scans(scans), from_store(stored)
    for index in range(len(scans)):
        (image, affine), (other, same) = whole_scan(slow, index), whole_scan(fast, index)
        assert torch.equal(other, image)
        torch.testing.assert_close(same, affine, rtol=0, atol=1e-5)


def test_air_is_told_from_body_in_the_same_way_at_the_very_threshold(tmp_path):
    """Every second scan has most of its voxels within a bit of the foreground's HU, where rounding decides."""
    random = np.random.default_rng(0)
    made = {}
    for i in range(8):
        values = [-83.1, -83.1 + 1e-5, -83.1 - 1e-5, 40.0] if i % 2 else [-84, -83, 40]
        made[f"{i}"] = (random.choice(np.array(values, np.float32), size=(20, 20, 20)), "LPS")
    scans, stored = write(tmp_path, AWKWARD, made)
    slow, fast = (
        make(data, window=AWKWARD, min_body=0.5) for make, data in ((from_scans, scans), (from_store, stored))
    )
    redrawn = set()
    for draw in range(24):
        for one, other in zip(fast[draw], slow[draw], strict=True):
            assert torch.equal(intensities(one["image"], AWKWARD[:2]), other["image"])
            assert all(one[name] == other[name] for name in COUNTS)
            redrawn.add(one["redrawn"])
    assert len(redrawn) > 1


def test_one_scan_of_fractions_makes_all_crops_float32_as_a_batch_has_one_type(tmp_path):
    made = volumes()
    made["lps"] = (made["lps"][0].astype(np.float32) + np.float32(0.1), "LPS")
    scans, stored = write(tmp_path, made=made)
    slow, fast = from_scans(scans), from_store(stored)
    for draw in range(12):
        for one, other in zip(fast[draw], slow[draw], strict=True):
            assert one["image"].dtype == torch.float32
            assert torch.equal(intensities(one["image"], OFFICIAL[:2]), other["image"])


def batches(dataset, *, workers, first=0):
    sampler = DrawSampler(iterations=8, batch_size=3)
    sampler.first = first
    return list(DataLoader(dataset, sampler=sampler, batch_size=3, num_workers=workers))


def equal(one, other):
    return len(one) == len(other) and all(
        set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(stored, workers):
    dataset = from_store(stored)
    alone = batches(dataset, workers=0)  # blosc2 has worked here before the workers are forked
    assert alone[0]["image"].shape == (6, 1, *ROI) and alone[0]["image"].dtype == torch.int16
    assert equal(alone, batches(dataset, workers=workers))
    assert not equal(alone, batches(from_store(stored, seed=1), workers=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_sampler_gives_the_tail_of_the_unbroken_sequence(stored, workers):
    unbroken = batches(from_store(stored), workers=0)
    assert equal(unbroken[5:], batches(from_store(stored), workers=workers, first=5))


def test_a_draw_is_the_same_whenever_it_is_asked_for(stored):
    dataset = from_store(stored)
    forward = [dataset[draw] for draw in range(12)]
    for draw in reversed(range(12)):
        for one, other in zip(dataset[draw], forward[draw], strict=True):
            assert torch.equal(one["image"], other["image"])


def test_padding_is_0_in_the_window_around_the_body_box_and_not_around_the_scan(tmp_path):
    """The box holds one voxel; its neighbours of 500 HU are outside of it and must not come in."""
    voxels = np.full((30, 30, 30), 500, dtype=np.int16)
    write_scan(tmp_path / "a.b2nd", voxels=voxels, affine=np.eye(4), body_box=[[10, 11], [0, 30], [0, 30]])
    for window in (OFFICIAL, AWKWARD):
        (crop, _) = from_store([{"image": tmp_path / "a.b2nd"}], window=window)[0]
        scaled = intensities(crop["image"], window[:2])[0]
        expected = torch.zeros(ROI)
        expected[7] = intensities(torch.tensor(500), window[:2])  # 15 rows too few: 7 before, 8 behind
        assert torch.equal(scaled, expected) and crop["padded"] == 1


def test_a_scan_without_body_gives_air(tmp_path):
    write_scan(tmp_path / "a.b2nd", voxels=np.full((30, 30, 30), -1000), affine=np.eye(4), body_box=[[0, 0]] * 3)
    for crop in from_store([{"image": tmp_path / "a.b2nd"}])[0]:
        assert not intensities(crop["image"], OFFICIAL[:2]).any()
        assert (crop["padded"], crop["redrawn"], crop["airy"]) == (1, 19, 1)


def test_a_crop_needs_the_memory_of_a_crop(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, size=(160, 160, 160)).astype(np.int16)  # 8 MB
    write_scan(tmp_path / "a.b2nd", voxels=voxels, affine=np.eye(4), body_box=[[0, 160]] * 3)
    del voxels
    dataset = from_store([{"image": tmp_path / "a.b2nd"}])
    dataset[0]
    tracemalloc.start()
    try:
        for draw in range(20):
            dataset[draw]
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000 and kept < 50_000


def test_a_missing_scan_is_named_before_the_run(stored, tmp_path):
    with pytest.raises(InputError, match="gone.b2nd.*run prepare again"):
        from_store([*stored, {"image": str(tmp_path / "gone.b2nd")}])


@pytest.mark.parametrize(
    ("window", "words"),
    [([-1e6, 1000.0], r"--hu_window \[-1000000.0, 1000.0\] starts below -32768 HU"), ([3.0], "two values in HU")],
)
def test_windows_that_stored_scans_cannot_have_are_refused(stored, window, words):
    with pytest.raises(InputError, match=words):
        StoredCrops(data=stored, cropping=cropping(), hu_window=window, seed=0)
