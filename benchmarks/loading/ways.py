# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The ways to load crops that `benchmarks.data` compares; it describes them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from monai.data import Dataset, PersistentDataset, list_data_collate
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandSpatialCropSamplesd,
    ScaleIntensityRanged,
    SpatialPadd,
    ToTensord,
)

from benchmarks.side_by_side import resident_bytes
from bundles.common.data.foreground import above_or_all
from bundles.common.data.seeded_crops import SeededCrops
from bundles.common.scans.decode_once import LoadScand
from bundles.pretraining.crops.body_crops import RandBodyCropsd
from bundles.pretraining.crops.hu_window import intensities
from bundles.pretraining.crops.stored_crops import StoredCrops

OFFICIAL = "official chain"
PERSISTENT = "PersistentDataset"
NIFTI, CACHED = "NIfTI", "NIfTI, all cached"
STORE, WINDOWED = "store", "store, window here"
EQUAL = (NIFTI, CACHED, STORE, WINDOWED)  # the bundle's ways: the same draw gives the same crops
WAYS = (OFFICIAL, PERSISTENT, *EQUAL)
HU_WINDOW, FOREGROUND_HU, MIN_BODY = (-1000.0, 1000.0), -500.0, 0.01  # values of train.yaml
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Input of a loading process.

    Attributes:
        scans: NIfTI files.
        stored: the same scans in the format of the store.
        cache: cache folder of the `PersistentDataset`.
        roi_size: crop size in voxels.
        crops: number of crops per draw.
    """

    scans: tuple[str, ...]
    stored: tuple[str, ...]
    cache: str
    roi_size: tuple[int, int, int]
    crops: int

    def files(self, way: str) -> list[str]:
        """Return the files that a way reads."""
        if way == PERSISTENT:
            return sorted(map(str, Path(self.cache).glob("*.pt")))
        return list(self.stored if way in (STORE, WINDOWED) else self.scans)


def official_transforms(roi_size: Sequence[int], crops: int) -> Compose:
    """Transforms of SwinUNETR/Pretrain/utils/data_utils.py in the official repository, for current MONAI."""
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            ScaleIntensityRanged("image", a_min=-1000.0, a_max=1000.0, b_min=0.0, b_max=1.0, clip=True),
            SpatialPadd("image", spatial_size=roi_size),
            CropForegroundd("image", source_key="image", k_divisible=roi_size, allow_smaller=True),
            RandSpatialCropSamplesd(
                "image", roi_size=roi_size, num_samples=crops, random_center=True, random_size=False
            ),
            ToTensord("image"),
        ]
    )


def bundle_preprocessing() -> Compose:
    """``preprocessing`` of train.yaml without resampling."""
    low, high = HU_WINDOW
    body = partial(above_or_all, other=FOREGROUND_HU)
    return Compose(
        [
            LoadScand("image", image_only=True),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            CropForegroundd("image", source_key="image", select_fn=body, allow_smaller=True),
            ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        ]
    )


def persistent_dataset(job: Job) -> PersistentDataset:
    """Build the `PersistentDataset`. It adds missing items to its cache folder when they are read."""
    transforms = official_transforms(job.roi_size, job.crops)
    return PersistentDataset([{"image": file} for file in job.scans], transforms, cache_dir=job.cache)


def bundle_dataset(way: str, job: Job) -> SeededCrops | StoredCrops:
    """Build the dataset that `crop_dataset` builds for train.yaml, unshuffled: draw ``i`` reads scan ``i``."""
    low, high = HU_WINDOW
    cropping = RandBodyCropsd(
        "image",
        roi_size=job.roi_size,
        num_samples=job.crops,
        threshold=(FOREGROUND_HU - low) / (high - low),
        min_body=MIN_BODY,
    )
    data = [{"image": file} for file in job.files(way)]
    if way in (STORE, WINDOWED):
        return StoredCrops(data=data, cropping=cropping, hu_window=list(HU_WINDOW), seed=SEED, shuffle=False)
    return SeededCrops(
        data=data,
        preprocessing=bundle_preprocessing(),
        augmentation=cropping,
        seed=SEED,
        cache_num=len(data) if way == CACHED else 0,
        shuffle=False,
    )


class Loader:
    """Loads crops in one way; lives in the measured process."""

    def __init__(self, way: str, job: Job) -> None:
        torch.set_num_threads(1)  # as a DataLoader does in its workers
        self.before = resident_bytes("VmRSS")
        self.way = way
        self.files = job.files(way)
        if way == OFFICIAL:
            items = [{"image": file} for file in self.files]
            self.dataset = Dataset(items, official_transforms(job.roi_size, job.crops))
        else:
            self.dataset = persistent_dataset(job) if way == PERSISTENT else bundle_dataset(way, job)
        if way in (OFFICIAL, PERSISTENT):
            self.dataset.transform.set_random_state(seed=SEED)

    def draw(self, number: int) -> torch.Tensor:
        """Return the crops of a draw, (crops, 1, *roi_size): float32 in [0, 1], or HU for `STORE`."""
        seeded = self.way in EQUAL  # these are indexed by the draw, which may exceed the number of scans
        crops = list_data_collate([self.dataset[number if seeded else number % len(self.dataset)]])["image"]
        return intensities(crops, HU_WINDOW) if self.way == WINDOWED else crops

    def draw_all(self, draws: range, *, cold: bool, hashes: bool) -> tuple[float, list[str]]:
        """Run the draws in order; return the total seconds and, with ``hashes``, hashes of the windowed crops."""
        seconds, digests = 0.0, []
        for number in draws:
            if cold:
                for file in self.files:
                    drop_from_cache(file)
            begin = time.perf_counter()
            crops = self.draw(number)
            seconds += time.perf_counter() - begin
            if hashes:
                crops = intensities(crops, HU_WINDOW) if self.way == STORE else crops
                form = f"{tuple(crops.shape)} {crops.dtype} ".encode()
                digests.append(hashlib.sha256(form + crops.numpy().tobytes()).hexdigest())
        return seconds, digests

    def memory(self) -> dict[str, int]:
        """Return the peak resident bytes so far, and their excess over the beginning (``above``)."""
        peak = resident_bytes("VmHWM")
        return {"peak": peak, "above": peak - self.before}


def drop_from_cache(file: str) -> None:
    """Drop a file from the system's page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not on the disk yet would not be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def stays_in_cache(file: str) -> bool:
    """Return whether a byte in the middle of the file can be read without disk access after `drop_from_cache`."""
    drop_from_cache(file)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(1)], os.path.getsize(file) // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support the flag
        pass
    finally:
        os.close(descriptor)
    return True
