# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Crops per second and memory of the ways to load them, side by side in one run.

    python -m benchmarks.data                               two generated CT of 512 x 512 x 200
    python -m benchmarks.data DATA --cold                   scans of yours, read from the disk for every draw
    python -m benchmarks.data --list_lengths 10 100         and the store's memory for longer lists

A draw is what a worker makes of one volume: a batch of ``--crops`` crops. The ways to it:

- *official chain*: the transforms of the released code over MONAI's ``Dataset``, its default: load, RAS, window, pad to
  the crop, box around what is not air in multiples of the crop, random crops. Every draw decodes a scan.
- *PersistentDataset*: the same transforms; MONAI keeps what comes before the random crops as tensors on the disk.
- *NIfTI*: `SeededCrops` with the preprocessing of train.yaml, nothing cached; *NIfTI, all cached* keeps every
  preprocessed volume in memory (left out if that would take more than half of what is free).
- *store*: `StoredCrops` on what `prepare` writes, in HU as it is handed to the device, where training applies the
  window; *store, window here* applies it too, so that it ends with what the other ways give: float32 in [0, 1]. Before
  anything is timed, the crops of the store in the window are compared with those of NIfTI, to the bit.

Each way is a process of its own with one thread, as a worker of a DataLoader. They take turns: in each round each way
draws once from every scan, while the others wait. Times are wall-clock; the hand-over from a worker to the training
process is not in them. *peak* is the most memory that the process had resident (VmHWM of Linux); *above* is what of it
came on top of Python, PyTorch and MONAI.

Warm: every file was read before and stays in the system's page cache, as far as it fits. Cold (``--cold``): before each
draw the way's files are dropped from the page cache (``POSIX_FADV_DONTNEED``, which needs no root). A cache below the
system, of a virtual machine's host or a RAID controller, cannot be emptied from here.

All files that are made lie in a temporary folder (``TMPDIR`` chooses where). Runs on Linux.
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
EQUAL = (NIFTI, CACHED, STORE, WINDOWED)  # the bundle's: the same crops for the same draw
WAYS = (OFFICIAL, PERSISTENT, *EQUAL)
HU_WINDOW, FOREGROUND_HU, MIN_BODY = (-1000.0, 1000.0), -500.0, 0.01  # of train.yaml
SEED = 0
MIB, GIB = 2**20, 2**30
START = "spawn"  # of the processes: with a fork their memory would begin with ours
PACKAGES = ("torch", "monai", "nibabel", "numpy", "blosc2")
ELLIPSOID = (0.8, 0.55, 1.5)  # axes of the generated body over those of the scan: cut off at the top and the bottom
BLOB = 24  # voxels of a generated scan from one random value of its texture to the next


# ---- the ways ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a loading process is given.

    Attributes:
        scans: the NIfTI files.
        stored: the same as stored scans.
        cache: folder of the `PersistentDataset`.
        roi_size: voxels of a crop.
        crops: per draw.
    """

    scans: tuple[str, ...]
    stored: tuple[str, ...]
    cache: str
    roi_size: tuple[int, int, int]
    crops: int

    def files(self, way: str) -> list[str]:
        """The files that a way draws from."""
        if way == PERSISTENT:
            return sorted(map(str, Path(self.cache).glob("*.pt")))
        return list(self.stored if way in (STORE, WINDOWED) else self.scans)


def official_transforms(roi_size: Sequence[int], crops: int) -> Compose:
    """The chain of SwinUNETR/Pretrain/utils/data_utils.py of the official repository, in today's MONAI."""
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
    """``preprocessing`` of train.yaml, without a spacing."""
    low, high = HU_WINDOW
    body = partial(above_or_all, other=FOREGROUND_HU)
    return Compose(
        [
            LoadImaged("image", image_only=True),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            CropForegroundd("image", source_key="image", select_fn=body, allow_smaller=True),
            ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        ]
    )


def persistent_dataset(job: Job) -> PersistentDataset:
    """What is not yet in the folder of the cache is put there when it is read."""
    transforms = official_transforms(job.roi_size, job.crops)
    return PersistentDataset([{"image": file} for file in job.scans], transforms, cache_dir=job.cache)


def bundle_dataset(way: str, job: Job) -> SeededCrops | StoredCrops:
    """As `crop_dataset` makes it of the options of train.yaml; draw ``i`` is of scan ``i``."""
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
    """One way, in the process that is measured."""

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
        """The crops of a draw, (crops, 1, *roi_size): float32 in [0, 1], of `STORE` HU."""
        seeded = self.way in EQUAL  # by the number of the draw, which goes on beyond the number of scans
        crops = list_data_collate([self.dataset[number if seeded else number % len(self.dataset)]])["image"]
        return intensities(crops, HU_WINDOW) if self.way == WINDOWED else crops

    def draw_all(self, draws: range, *, cold: bool, hashes: bool) -> tuple[float, list[str]]:
        """Draw one after the other; return the seconds, and if asked for hashes of the crops in the window."""
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
                shown = f"{tuple(crops.shape)} {crops.dtype} ".encode()
                digests.append(hashlib.sha256(shown + crops.numpy().tobytes()).hexdigest())
        return seconds, digests

    def memory(self) -> dict[str, int]:
        """Bytes: the most so far, and what of it is more than there was at the beginning."""
        peak = resident_bytes("VmHWM")
        return {"peak": peak, "above": peak - self.before}


def drop_from_cache(file: str) -> None:
    """Have the system forget what it holds of a file in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not yet on the disk would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def stays_in_cache(file: str) -> bool:
    """Whether a byte in the middle of the file can still be had without waiting for a disk after `drop_from_cache`."""
    drop_from_cache(file)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(1)], os.path.getsize(file) // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot tell
        pass
    finally:
        os.close(descriptor)
    return True


# ---- processes -----------------------------------------------------------------------------------------------------

_loader: Loader | None = None  # of the process


def _begin(way: str, job: Job) -> None:
    global _loader
    _loader = Loader(way, job)


def _call(method: str, *arguments: Any, **options: Any) -> Any:
    return getattr(_loader, method)(*arguments, **options)


class LoadingProcess:
    """A `Loader` in a process of its own; its methods raise `BrokenProcessPool` if that was killed (out of memory)."""

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
    """Write a CT with the axes of a scanner (LPS): an ellipsoid of textured tissue in noisy air, int16.

    What matters here is that it packs about as well as a real scan.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, *(size // BLOB + 2 for size in shape), generator=generator)
    texture = F.interpolate(coarse, size=tuple(shape), mode="trilinear")[0, 0]
    away = torch.zeros(1, 1, 1)  # from the centre, 1 on the surface
    for axis, (size, part) in enumerate(zip(shape, ellipsoid, strict=True)):
        places = torch.linspace(-1, 1, size) / part
        away = away + (places**2).reshape([-1 if other == axis else 1 for other in range(3)])
    noise = torch.randn(tuple(shape), generator=generator)
    hu = torch.where(away <= 1, 40 + 60 * texture + 12 * noise, -1000 + 6 * noise)
    image = nib.Nifti1Image(hu.round().to(torch.int16).numpy(), np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
    nib.save(image, path)


def find_scans(sources: Sequence[str], most: int) -> list[str]:
    """NIfTI files of folders or data lists, at most so many of them, taken evenly.

    Raises:
        InputError: see `unlabelled_scans`; or a scan is several files.
    """
    found = [item["image"] for item in unlabelled_scans(list(sources), section="all")]
    for image in found:
        if not isinstance(image, str):
            raise InputError(f"{image[0]} is one of {len(image)} files of a scan: give CT scans of one file each.")
    taken = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[index] for index in taken]


def store_scans(scans: Sequence[str], folder: str) -> list[str]:
    """Write stored scans as `prepare` does; return their files.

    Raises:
        InputError: a scan cannot be used, with the reason.
    """
    recipe = Recipe(
        foreground_hu=FOREGROUND_HU, min_body=1, min_slices=1, max_spacing=1e6, keep_suspect=True, write_nifti=False
    )
    stored = []
    for number, scan in enumerate(scans):
        candidate = Candidate(f"{number:04d}", source=scan, kind="nifti", files=(scan,))
        row = prepare_scan(Task(candidate, recipe, folder))
        if row["verdict"] != USED:
            raise InputError(f"{scan} {row['reason']}. Mend it, or name a folder without it.")
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
        sources: folders or data lists; without any, two scans are generated.
        shape: voxels of the generated ones.
        scans: most scans to take of the sources.
        crops: per draw.
        roi_size: voxels of a crop.
        repeats: timed rounds; in each, each way draws once from every scan.
        cold: drop files from the page cache before each draw.
        list_lengths: how many times over to list the scans for the memory of the store.

    Returns:
        The options, ``machine``, ``versions``, and

        - ``scans``: file, shape and bytes of each;
        - ``made``: seconds and bytes of ``store`` and ``cache``;
        - ``not_dropped``: files that stayed in the page cache; ``draws_compared``: of NIfTI and store;
        - ``ways``: ``{way: {"seconds": per round, "crops_per_second": median, "ratio" to the official chain, "peak",
          "above", "bytes" on the disk}}``, or ``{"left_out": reason}``;
        - ``list_lengths``: of `memory_of_lists`, or None.

    Raises:
        InputError: from `find_scans` or `store_scans`.
        RuntimeError: the crops of two ways that must be equal are not.
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
    """``draws_compared`` and ``ways`` of `compare`."""
    number, alive, left_out = len(job.scans), {}, {}
    wanted = 4 * sum(int(np.prod(scan["shape"])) for scan in scans)  # float32
    if wanted > _from_proc("/proc/meminfo", "MemAvailable") / 2:
        left_out[CACHED] = f"would hold {wanted / GIB:.1f} GiB, more than half of the memory that is free"
    hashes: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {}

    def from_every_scan(way: str, first: int, **options: bool) -> tuple[float, list[str]] | None:
        try:
            if way not in alive:
                alive[way] = processes.enter_context(LoadingProcess(way, job))
            return alive[way].draw_all(range(first, first + number), cold=cold, **options)
        except BrokenProcessPool:
            left_out[way] = "killed by the system: out of memory?"
            return None

    # Also fills the page cache, and the memory of all that is imported when it is first used.
    for way in track(WAYS, description="First draws", console=Console(stderr=True), transient=True):
        if way not in left_out and (drawn := from_every_scan(way, 0, hashes=True)):
            hashes[way] = drawn[1]
    equal = {way: hashes[way] for way in EQUAL if way in hashes}
    for way, digests in equal.items():
        for draw, digest in enumerate(digests):
            if any(other[draw] != digest for other in equal.values()):
                raise RuntimeError(
                    f"Draw {draw} of {job.scans[draw]} gives other crops by '{way}' than by {list(equal)}."
                )
    for repeat in track(range(repeats), description="Rounds", console=Console(stderr=True), transient=True):
        for way in WAYS:
            if way not in left_out and (drawn := from_every_scan(way, (1 + repeat) * number)):
                seconds.setdefault(way, []).append(drawn[0])
    ways: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        if way in left_out:
            ways[way] = {"left_out": left_out[way]}
            continue
        ways[way] = {
            "seconds": seconds[way],
            "crops_per_second": number * job.crops / statistics.median(seconds[way]),
            **alive[way].memory(),
            "bytes": _bytes(job.files(way)),
        }
    if OFFICIAL not in left_out:
        for way in ways.values():
            if "crops_per_second" in way:
                way["ratio"] = way["crops_per_second"] / ways[OFFICIAL]["crops_per_second"]
    return {"draws_compared": number if len(equal) > 1 else 0, "ways": ways}


def memory_of_lists(job: Job, lengths: Sequence[int], folder: str) -> dict[str, Any]:
    """Memory of the store's loader for lists of several lengths, after the same number of draws.

    The scans are listed many times over under names of their own (links), and drawn in turn until the longest list has
    been gone through once: a loader that keeps anything of a scan shows it.
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
    """Bytes of an entry of a file of Linux, which gives them in KiB."""
    return next(1024 * int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))


# ---- the table -----------------------------------------------------------------------------------------------------


def _rows(ways: dict[str, dict[str, Any]], crops: int) -> list[dict[str, str]]:
    """Cells of each way by their headings; ``crops`` are those of a round."""
    rows = []
    for name, way in ways.items():
        if "left_out" in way:
            rows.append({"way": name, "crops/s": "left out"})
            continue
        speeds = [crops / seconds for seconds in (max(way["seconds"]), min(way["seconds"]))]
        row = {"way": name, "crops/s": f"{way['crops_per_second']:.4g}"}
        row["least – most"] = " – ".join(f"{speed:.4g}" for speed in speeds)
        if "ratio" in way:
            row["ratio"] = f"{way['ratio']:.4g}"
        row["ms a crop"] = f"{1000 / way['crops_per_second']:.4g}"
        row |= {f"{part}\nMiB": f"{way[part] / MIB:.0f}" for part in ("peak", "above")}
        row["on disk\nMiB"] = f"{way['bytes'] / MIB:.0f}"
        rows.append(row)
    return rows


def _length_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Cells of each length by their headings; ratios are to the first."""
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
    """What was measured, on what, and what was warm or cold."""
    scans, made, here = results["scans"], results["made"], results["machine"]
    shapes = ", ".join("x".join(map(str, scan["shape"])) for scan in scans)
    kind = "generated " * generated + "scan" + "s" * (len(scans) > 1)
    each = f"{results['crops']} crops of {' x '.join(map(str, results['roi_size']))}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"{len(scans)} {kind} ({shapes}), {each} a draw; rounds: {results['repeats']}; one process and thread a way",
        f"{here['cpu']}, {here['cores']} cores, {here['memory'] / GIB:.0f} GiB, load {here['load']:.1f}",
        versions,
    ]
    if results["cold"]:
        kept = results["not_dropped"]
        warmth = "cold: each way's files are dropped from the page cache before each draw" + (
            f", BUT {len(kept)} OF THEM WERE NOT SEEN TO LEAVE IT (a RAM disk?): {', '.join(kept[:3])}" if kept else ""
        )
    else:
        warmth = "warm: every file was read before and stays in the page cache, as far as it fits"
    lines.append(warmth)
    for name, what in (("store", "store, prepared"), ("cache", "cache of PersistentDataset, filled")):
        lines.append(f"{what} in {made[name]['seconds']:.1f} s: {made[name]['bytes'] / MIB:.0f} MiB")
    if results["draws_compared"]:
        lines.append(f"crops of NIfTI and store equal to the bit in {results['draws_compared']} draws compared")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description="Crops per second and memory of the ways to load them, side by side.",
    )
    add = parser.add_argument
    three = {"type": int, "nargs": 3, "metavar": ("X", "Y", "Z")}
    add("data", nargs="*", metavar="DATA", help="folder of NIfTI files, or data list (default: two generated CT)")
    add("--shape", default=[512, 512, 200], **three, help="voxels of the generated scans (default: 512 512 200)")
    add("--scans", type=int, default=4, help="most scans to take of DATA (default: 4)")
    add("--crops", type=int, default=2, help="per draw (default: 2)")
    add("--roi_size", default=[96, 96, 96], **three, help="voxels of a crop (default: 96 96 96)")
    add("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    add("--cold", action="store_true", help="drop the files from the page cache before each draw")
    add(
        *("--list_lengths", "--list-lengths"),
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="also list the scans so many times over, such as 10 100, and show the memory of the store's loader",
    )
    add("--json", metavar="FILE", help="write the numbers, in bytes and seconds")
    given = parser.parse_args(arguments)
    options = {name: value for name, value in vars(given).items() if name not in ("data", "json")}
    try:
        for name, value in options.items():
            if name != "cold" and min(value if isinstance(value, list) else [value], default=1) <= 0:
                raise InputError(f"--{name} {value}: give numbers above 0.")
        results = compare(sources=given.data, **options)
    except (InputError, OSError) as error:  # of the latter mostly: no room in the temporary folder
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
        console.print("\nMemory of the store's loader by the length of the list", style="bold")
        print_table(_length_rows(results["list_lengths"]), left=["listed"])
    if given.json:
        write_json(given.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
