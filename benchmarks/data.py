# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare ways of loading crops for pre-training: crops per second and memory, side by side in one run.

    python -m benchmarks.data                               two generated CTs of 512 x 512 x 200
    python -m benchmarks.data DATA --cold                   your own scans, read from the disk for every draw
    python -m benchmarks.data --list_lengths 10 100         also the memory of the store for longer lists

A draw is one batch of ``--crops`` crops from one volume. The ways to load it:

- *official chain*: the transforms of the released code with MONAI's ``Dataset``, the default there: load, RAS, window,
  pad to the crop, crop to the non-air foreground in multiples of the crop, random crops. Every draw decodes a scan.
- *PersistentDataset*: the same transforms. MONAI caches the result of all steps before the random crops on the disk.
- *NIfTI*: `SeededCrops` with the preprocessing of train.yaml and no cache.
- *NIfTI, all cached*: the same with every preprocessed volume in memory. Skipped if that would take more than half of
  the available memory.
- *store*: `StoredCrops` on the output of `prepare`. Crops are in HU: training applies the window on the device.
- *store, window here*: the same plus the window, so that the result is that of the other ways: float32 in [0, 1].

Before timing, the windowed crops of the store are checked to be bit-identical to those of NIfTI.

Each way runs in its own process with one thread, like a DataLoader worker. The ways take turns: in each round each way
draws once from every scan while the others wait. Times are wall-clock and exclude the transfer from a worker to the
training process. *peak* is the peak resident memory of the process (VmHWM of Linux). *above* is the part of it in
excess of Python, PyTorch and MONAI.

Warm: every file was read before and stays in the system's page cache, as far as it fits. Cold (``--cold``): the files
of a way are dropped from the page cache before each draw (``POSIX_FADV_DONTNEED``, which needs no root). Caches below
the operating system, such as that of a virtual machine's host or a RAID controller, cannot be dropped.

All files are written to a temporary folder (set ``TMPDIR`` to choose where). Requires Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
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
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F

from benchmarks.side_by_side import machine, print_table, resident_bytes, write_json
from bundles.common.data.data_list import unlabelled_scans
from bundles.common.data.foreground import above_or_all
from bundles.common.data.seeded_crops import SeededCrops
from bundles.common.errors import InputError
from bundles.common.scans.decode_once import LoadScand
from bundles.common.scans.search import Candidate
from bundles.pretraining.crops.body_crops import RandBodyCropsd
from bundles.pretraining.crops.hu_window import intensities
from bundles.pretraining.crops.stored_crops import StoredCrops
from bundles.pretraining.preparation.audit import USED
from bundles.pretraining.preparation.one_scan import Outputs, Recipe, Task, prepare_scan

OFFICIAL = "official chain"
PERSISTENT = "PersistentDataset"
NIFTI, CACHED = "NIfTI", "NIfTI, all cached"
STORE, WINDOWED = "store", "store, window here"
EQUAL = (NIFTI, CACHED, STORE, WINDOWED)  # the bundle's ways: the same draw gives the same crops
WAYS = (OFFICIAL, PERSISTENT, *EQUAL)
HU_WINDOW, FOREGROUND_HU, MIN_BODY = (-1000.0, 1000.0), -500.0, 0.01  # of train.yaml
SEED = 0
MIB, GIB = 2**20, 2**30
START = "spawn"  # a forked process would start with the memory of its parent
PACKAGES = ("torch", "monai", "nibabel", "numpy", "blosc2")
ELLIPSOID = (0.8, 0.55, 1.5)  # body axes relative to the scan; above 1: cut off at the top and the bottom
BLOB = 24  # voxels between the random values that the texture of a generated scan is interpolated from


# ---- the ways ------------------------------------------------------------------------------------------------------


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
    """Whether a byte in the middle of the file can be read without disk access after `drop_from_cache`."""
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


# ---- processes -----------------------------------------------------------------------------------------------------

_loader: Loader | None = None  # one per process


def _begin(way: str, job: Job) -> None:
    global _loader
    _loader = Loader(way, job)


def _call(method: str, *arguments: Any, **options: Any) -> Any:
    return getattr(_loader, method)(*arguments, **options)


class LoadingProcess:
    """A `Loader` in its own process. Methods raise `BrokenProcessPool` if the process was killed (out of memory)."""

    def __init__(self, way: str, job: Job) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=get_context(START))
        self.pool.submit(_begin, way, job).result()

    def __enter__(self) -> LoadingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def draw_all(self, draws: range, *, cold: bool = False, hashes: bool = False) -> tuple[float, list[str]]:
        """See `Loader.draw_all`."""
        return self.pool.submit(_call, "draw_all", draws, cold=cold, hashes=hashes).result()

    def memory(self) -> dict[str, int]:
        """See `Loader.memory`."""
        return self.pool.submit(_call, "memory").result()


# ---- the scans -----------------------------------------------------------------------------------------------------


def make_scan(
    path: str | os.PathLike,
    *,
    shape: Sequence[int],
    seed: int,
    spacing: Sequence[float] = (0.8, 0.8, 1.0),
    ellipsoid: Sequence[float] = ELLIPSOID,
) -> None:
    """Write a synthetic CT in scanner orientation (LPS): an ellipsoid of textured tissue in noisy air, int16.

    It compresses about as well as a real scan, which is what the benchmark depends on.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, *(size // BLOB + 2 for size in shape), generator=generator)
    texture = F.interpolate(coarse, size=tuple(shape), mode="trilinear")[0, 0]
    distance = torch.zeros(1, 1, 1)  # squared, from the centre; 1 on the surface
    for axis, (size, part) in enumerate(zip(shape, ellipsoid, strict=True)):
        positions = torch.linspace(-1, 1, size) / part
        distance = distance + (positions**2).reshape([-1 if other == axis else 1 for other in range(3)])
    noise = torch.randn(tuple(shape), generator=generator)
    hu = torch.where(distance <= 1, 40 + 60 * texture + 12 * noise, -1000 + 6 * noise)
    image = nib.Nifti1Image(hu.round().to(torch.int16).numpy(), np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
    nib.save(image, path)


def find_scans(sources: Sequence[str], most: int) -> list[str]:
    """Find the NIfTI files of folders or data lists; if there are more than ``most``, pick evenly spaced ones.

    Raises:
        InputError: see `unlabelled_scans`; or a scan consists of several files.
    """
    found = [item["image"] for item in unlabelled_scans(list(sources), section="all")]
    for image in found:
        if not isinstance(image, str):
            raise InputError(f"{image[0]} is one of {len(image)} files of a scan. Use CT scans with one file each.")
    chosen = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[index] for index in chosen]


def store_scans(scans: Sequence[str], folder: str) -> list[str]:
    """Write the scans in the format of the store, as `prepare` does; return the files.

    Raises:
        InputError: if a scan cannot be used, with the reason.
    """
    recipe = Recipe(
        foreground_hu=FOREGROUND_HU, min_body=1, min_slices=1, max_spacing=1e6, keep_suspect=True, write_nifti=False
    )
    stored = []
    for number, scan in enumerate(scans):
        candidate = Candidate(f"{number:04d}", source=scan, kind="nifti", files=(scan,))
        row = prepare_scan(Task(candidate, recipe, folder))
        if row["verdict"] != USED:
            raise InputError(f"{scan} {row['reason']}. Fix it, or use a folder without it.")
        stored.append(str(Outputs(folder, candidate.name).store))
    return stored


# ---- the comparison ------------------------------------------------------------------------------------------------


def compare(
    *,
    sources: Sequence[str] = (),
    shape: Sequence[int] = (512, 512, 200),
    scans: int = 4,
    crops: int = 2,
    roi_size: Sequence[int] = (96, 96, 96),
    repeats: int = 5,
    cold: bool = False,
    list_lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """Measure all ways.

    Args:
        sources: folders or data lists. If empty, two scans are generated.
        shape: size of the generated scans in voxels.
        scans: maximum number of scans to use from the sources.
        crops: number of crops per draw.
        roi_size: crop size in voxels.
        repeats: timed rounds. In each round each way draws once from every scan.
        cold: drop files from the page cache before each draw.
        list_lengths: how often to repeat the list of scans when measuring the memory of the store.

    Returns:
        The options, ``machine``, ``versions``, and

        - ``scans``: file, shape and bytes of each scan;
        - ``made``: seconds to write and bytes of ``store`` and ``cache``;
        - ``not_dropped``: files that stayed in the page cache;
        - ``draws_compared``: number of draws for which NIfTI and store were compared;
        - ``ways``: ``{way: {"seconds": per round, "crops_per_second": median, "ratio" to the official chain, "peak",
          "above", "bytes" on the disk}}``, or ``{"left_out": reason}``;
        - ``list_lengths``: result of `memory_of_lists`, or None.

    Raises:
        InputError: from `find_scans` or `store_scans`.
        RuntimeError: if ways that must give equal crops do not.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        files = find_scans(sources, scans) if sources else []
        for number in range(0 if sources else 2):
            files.append(f"{folder}/generated_{number}.nii.gz")
            make_scan(files[-1], shape=shape, seed=number)
        begin = time.perf_counter()
        stored = store_scans(files, folder)
        made = {"store": {"seconds": time.perf_counter() - begin, "bytes": _bytes(stored)}}
        job = Job(
            scans=tuple(files), stored=tuple(stored), cache=f"{folder}/cache", roi_size=tuple(roi_size), crops=crops
        )
        begin = time.perf_counter()
        dataset = persistent_dataset(job)
        for number in range(len(dataset)):
            dataset[number]
        made["cache"] = {"seconds": time.perf_counter() - begin, "bytes": _bytes(job.files(PERSISTENT))}
        results: dict[str, Any] = {
            "machine": machine(),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
            "crops": crops,
            "roi_size": list(roi_size),
            "repeats": repeats,
            "cold": cold,
            "scans": [
                {"file": os.path.basename(file), "shape": list(nib.load(file).shape[:3]), "bytes": _bytes([file])}
                for file in files
            ],
            "made": made,
            "not_dropped": [],
        }
        if cold:
            everything = [file for way in (NIFTI, PERSISTENT, STORE) for file in job.files(way)]
            results["not_dropped"] = [os.path.basename(file) for file in everything if stays_in_cache(file)]
        results |= _measured(job, results["scans"], repeats=repeats, cold=cold, processes=processes)
        processes.close()
        results["list_lengths"] = memory_of_lists(job, list_lengths, folder) if list_lengths else None
    return results


def _measured(
    job: Job, scans: Sequence[dict[str, Any]], *, repeats: int, cold: bool, processes: ExitStack
) -> dict[str, Any]:
    """Compute ``draws_compared`` and ``ways`` of `compare`."""
    number, alive, skipped = len(job.scans), {}, {}
    required = 4 * sum(int(np.prod(scan["shape"])) for scan in scans)  # float32
    if required > _from_proc("/proc/meminfo", "MemAvailable") / 2:
        skipped[CACHED] = f"needs {required / GIB:.1f} GiB, more than half of the available memory"
    hashes: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {}

    def from_every_scan(way: str, first: int, **options: bool) -> tuple[float, list[str]] | None:
        try:
            if way not in alive:
                alive[way] = processes.enter_context(LoadingProcess(way, job))
            return alive[way].draw_all(range(first, first + number), cold=cold, **options)
        except BrokenProcessPool:
            skipped[way] = "killed by the system, probably out of memory"
            return None

    # The first draws also fill the page cache and trigger lazy imports.
    for way in track(WAYS, description="First draws", console=Console(stderr=True), transient=True):
        if way not in skipped and (drawn := from_every_scan(way, 0, hashes=True)):
            hashes[way] = drawn[1]
    equal = {way: hashes[way] for way in EQUAL if way in hashes}
    for way, digests in equal.items():
        for draw, digest in enumerate(digests):
            if any(other[draw] != digest for other in equal.values()):
                raise RuntimeError(
                    f"Draw {draw}, {job.scans[draw]}: the crops of '{way}' differ from those of {list(equal)}."
                )
    for repeat in track(range(repeats), description="Rounds", console=Console(stderr=True), transient=True):
        for way in WAYS:
            if way not in skipped and (drawn := from_every_scan(way, (1 + repeat) * number)):
                seconds.setdefault(way, []).append(drawn[0])
    ways: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        if way in skipped:
            ways[way] = {"left_out": skipped[way]}
            continue
        ways[way] = {
            "seconds": seconds[way],
            "crops_per_second": number * job.crops / statistics.median(seconds[way]),
            **alive[way].memory(),
            "bytes": _bytes(job.files(way)),
        }
    if OFFICIAL not in skipped:
        for way in ways.values():
            if "crops_per_second" in way:
                way["ratio"] = way["crops_per_second"] / ways[OFFICIAL]["crops_per_second"]
    return {"draws_compared": number if len(equal) > 1 else 0, "ways": ways}


def memory_of_lists(job: Job, lengths: Sequence[int], folder: str) -> dict[str, Any]:
    """Measure the memory of the store's loader for lists of several lengths, after the same number of draws.

    Each list repeats the scans under distinct names (links). The number of draws is one pass over the longest list, so
    a loader that keeps anything per scan shows it.
    """
    draws = max(lengths) * len(job.stored)
    results: dict[str, dict[str, int]] = {}
    for length in track(lengths, description="Lists", console=Console(stderr=True), transient=True):
        links = []
        for number in range(length * len(job.stored)):
            link = Path(folder, f"list_{length}", f"{number:06d}.b2nd")
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(job.stored[number % len(job.stored)])
            links.append(str(link))
        listed = Job(scans=(), stored=tuple(links), cache="", roi_size=job.roi_size, crops=job.crops)
        with LoadingProcess(STORE, listed) as process:
            process.draw_all(range(draws))
            results[str(length)] = {"listed": len(links), **process.memory()}
    return {"draws": draws, "lengths": results}


def _bytes(files: Sequence[str]) -> int:
    return sum(os.path.getsize(file) for file in files)


def _from_proc(path: str, name: str) -> int:
    """Bytes of an entry of a /proc file, where Linux states them in KiB."""
    return next(1024 * int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))


# ---- the table -----------------------------------------------------------------------------------------------------


def _rows(ways: dict[str, dict[str, Any]], crops: int) -> list[dict[str, str]]:
    """Table cells of each way by column heading; ``crops`` is the number of crops per round."""
    rows = []
    for name, way in ways.items():
        if "left_out" in way:
            rows.append({"way": name, "crops/s": "skipped"})
            continue
        speeds = [crops / seconds for seconds in (max(way["seconds"]), min(way["seconds"]))]
        row = {"way": name, "crops/s": f"{way['crops_per_second']:.4g}"}
        row["min – max"] = " – ".join(f"{speed:.4g}" for speed in speeds)
        if "ratio" in way:
            row["ratio"] = f"{way['ratio']:.4g}"
        row["ms per\ncrop"] = f"{1000 / way['crops_per_second']:.4g}"
        row |= {f"{part}\nMiB": f"{way[part] / MIB:.0f}" for part in ("peak", "above")}
        row["on disk\nMiB"] = f"{way['bytes'] / MIB:.0f}"
        rows.append(row)
    return rows


def _length_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Table cells of each list length by column heading; ratios are relative to the first length."""
    first = next(iter(results["lengths"].values()))
    rows = []
    for length, memory in results["lengths"].items():
        row = {"listed": f"{length} times", "scans": str(memory["listed"]), "draws": str(results["draws"])}
        for part in ("peak", "above"):
            row[f"{part}\nMiB"] = f"{memory[part] / MIB:.1f}"
            row[f"{part}\nratio"] = f"{memory[part] / first[part]:.3f}"
        rows.append(row)
    return rows


def _heading(results: dict[str, Any], generated: bool) -> list[str]:
    """Lines above the table: what was measured, on which machine, warm or cold."""
    scans, made, here = results["scans"], results["made"], results["machine"]
    shapes = ", ".join("x".join(map(str, scan["shape"])) for scan in scans)
    kind = "generated " * generated + "scan" + "s" * (len(scans) > 1)
    each = f"{results['crops']} crops of {' x '.join(map(str, results['roi_size']))}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"{len(scans)} {kind} ({shapes}), {each} per draw; rounds: {results['repeats']}; "
        "one process with one thread per way",
        f"{here['cpu']}, {here['cores']} cores, {here['memory'] / GIB:.0f} GiB, load {here['load']:.1f}",
        versions,
    ]
    if results["cold"]:
        kept = results["not_dropped"]
        lines.append("cold: each way's files are dropped from the page cache before each draw")
        if kept:
            lines[-1] += f", BUT {len(kept)} OF THEM STAYED IN IT (on a RAM disk?): {', '.join(kept[:3])}"
    else:
        lines.append("warm: every file was read before and stays in the page cache, as far as it fits")
    for name, what in (("store", "store prepared"), ("cache", "cache of PersistentDataset filled")):
        lines.append(f"{what} in {made[name]['seconds']:.1f} s: {made[name]['bytes'] / MIB:.0f} MiB")
    if results["draws_compared"]:
        lines.append(f"crops of NIfTI and store are bit-identical in all {results['draws_compared']} compared draws")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its tables; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description="Compare ways of loading crops: crops per second and memory, side by side.",
    )
    add = parser.add_argument
    three = {"type": int, "nargs": 3, "metavar": ("X", "Y", "Z")}
    add("data", nargs="*", metavar="DATA", help="folder of NIfTI files, or data list (default: two generated CTs)")
    add("--shape", default=[512, 512, 200], **three, help="size of generated scans in voxels (default: 512 512 200)")
    add("--scans", type=int, default=4, help="maximum number of scans to use from DATA (default: 4)")
    add("--crops", type=int, default=2, help="crops per draw (default: 2)")
    add("--roi_size", default=[96, 96, 96], **three, help="crop size in voxels (default: 96 96 96)")
    add("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    add("--cold", action="store_true", help="drop the files from the page cache before each draw")
    add(
        *("--list_lengths", "--list-lengths"),
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="also measure the memory of the store's loader with the scans listed N times, such as 10 100",
    )
    add("--json", metavar="FILE", help="write the results to FILE, in bytes and seconds")
    given = parser.parse_args(arguments)
    options = {name: value for name, value in vars(given).items() if name not in ("data", "json")}
    try:
        for name, value in options.items():
            if name != "cold" and min(value if isinstance(value, list) else [value], default=1) <= 0:
                raise InputError(f"--{name} {value}: must be above 0.")
        results = compare(sources=given.data, **options)
    except (InputError, OSError) as error:  # OSError: usually no space left in the temporary folder
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    console = Console()
    for line in _heading(results, generated=not given.data):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    print_table(_rows(results["ways"], len(results["scans"]) * given.crops), left=["way"])
    for name, way in results["ways"].items():
        if "left_out" in way:
            console.print(f"{name}: {way['left_out']}", highlight=False)
    if results["list_lengths"]:
        console.print("\nMemory of the store's loader by list length", style="bold")
        print_table(_length_rows(results["list_lengths"]), left=["listed"])
    if given.json:
        write_json(given.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
