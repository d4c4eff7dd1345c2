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
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.loading.process import LoadingProcess
from benchmarks.loading.scans import find_scans, make_scan, store_scans
from benchmarks.loading.ways import (
    CACHED,
    EQUAL,
    NIFTI,
    OFFICIAL,
    PERSISTENT,
    STORE,
    WAYS,
    Job,
    persistent_dataset,
    stays_in_cache,
)
from benchmarks.side_by_side import machine, print_table, write_json
from bundles.common.errors import InputError

MIB, GIB = 2**20, 2**30
PACKAGES = ("torch", "monai", "nibabel", "numpy", "blosc2")


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
    """Return the bytes of an entry of a /proc file, where Linux states them in KiB."""
    return next(1024 * int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))


# ---- the table -----------------------------------------------------------------------------------------------------


def _rows(ways: dict[str, dict[str, Any]], crops: int) -> list[dict[str, str]]:
    """Return the table cells of each way by column heading; ``crops`` is the number of crops per round."""
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
    """Return the table cells of each list length by column heading; ratios are relative to the first length."""
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
    """Return the lines above the table: what was measured, on which machine, warm or cold."""
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
