# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare ways of mapping predicted probabilities back to the scan's own voxels: memory, time and agreement.

    python -m benchmarks.mask_inversion

The scan is synthetic, stored as by a CT scanner (LPS), and preprocessed as in the bundle (orientation, spacing, crop).
Its probabilities are smooth random fields. The ways:

- *class volumes, Invertd*: invert all class volumes (``nearest_interp=False``), then argmax. This is the reference that
  the results of the others are compared with.
- *label map, Invertd*: argmax, then invert (``nearest_interp=True``).
- *MaskOnScanGridd, linear* and *nearest*: `segmentation.inference.mask_on_scan_grid`, equivalent to the first and the second.

Each way runs in its own process. *peak* is the peak memory of the process (`resource.getrusage`). *above* is the part
of it in excess of PyTorch, MONAI and the probabilities. Dice is over all classes except the first (the organs). All
files are in a temporary folder and take about 4 bytes per class and voxel of the preprocessed scan.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import AsDiscreted, Compose, CropForegroundd, Invertd, Orientationd, Spacingd
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.segmentation.inference.mask_on_scan_grid import MaskOnScanGridd

GIB = 2**30
REFERENCE = "class volumes, Invertd"
WAYS = (REFERENCE, "label map, Invertd", "MaskOnScanGridd, linear", "MaskOnScanGridd, nearest")
BLOB = 12  # voxels between the random values that the probabilities are interpolated from


def _preprocessing(model_spacing: Sequence[float]) -> Compose:
    return Compose(
        [
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=model_spacing),
            CropForegroundd("image", source_key="image", allow_smaller=True),
        ]
    )


def make_item(
    folder: str, *, shape: Sequence[int], spacing: Sequence[float], model_spacing: Sequence[float], classes: int
) -> MetaTensor:
    """Write the probabilities of a scan; return the preprocessed scan (of the same shape, with applied operations)."""
    affine = torch.diag(torch.tensor([-spacing[0], -spacing[1], spacing[2], 1], dtype=torch.float64))
    meta = {"original_affine": affine.numpy(), "spatial_shape": np.array(shape), "filename_or_obj": "scan.nii.gz"}
    scan = MetaTensor(torch.ones(1, *shape), affine=affine, meta=meta)
    image = _preprocessing(model_spacing)({"image": scan})["image"]
    size = image.shape[1:]
    noise = torch.randn(1, classes, *(n // BLOB + 2 for n in size), generator=torch.Generator().manual_seed(0))
    probabilities = torch.empty(classes, *size)
    for number in range(classes):
        probabilities[number] = F.interpolate(noise[:, number : number + 1], size=size, mode="trilinear")[0, 0] * 4
    for start in range(0, size[0], 8):
        probabilities[:, start : start + 8] = probabilities[:, start : start + 8].softmax(0)
    torch.save(probabilities, f"{folder}/probabilities.pt")
    return image


def run_way(
    way: str, folder: str, image: MetaTensor, *, model_spacing: Sequence[float], threads: int
) -> dict[str, float]:
    """Map the probabilities back in one way, in this process, and write the label map; return seconds and bytes."""
    torch.set_num_threads(threads)
    item = {"image": image, "pred": MetaTensor(torch.load(f"{folder}/probabilities.pt"))}
    invert = {"keys": "pred", "transform": _preprocessing(model_spacing), "orig_keys": "image"}
    winner = AsDiscreted("pred", argmax=True)
    steps = {
        "class volumes, Invertd": [Invertd(**invert, nearest_interp=False), winner],
        "label map, Invertd": [winner, Invertd(**invert, nearest_interp=True)],
        "MaskOnScanGridd, linear": [MaskOnScanGridd("pred", mode="linear")],
        "MaskOnScanGridd, nearest": [MaskOnScanGridd("pred", mode="nearest")],
    }[way]
    before, begin = _resident_bytes(), time.perf_counter()
    labels = Compose(steps)(item)["pred"]
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    np.save(f"{folder}/{WAYS.index(way)}.npy", labels[0].numpy().astype(np.uint8))
    return {"seconds": seconds, "peak": peak, "above": peak - before}


def _resident_bytes() -> int:
    """Return the current resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_a_process(function: Any, *arguments: Any, **options: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def dice_of_organs(one: np.ndarray, other: np.ndarray, *, classes: int) -> np.ndarray:
    """Return the Dice of the classes 1, 2, ...; NaN for a class that is in neither label map."""
    pairs = np.zeros((classes, classes), dtype=np.int64)
    for a, b in zip(one, other, strict=True):  # slice by slice, because indices take 8 bytes per voxel
        index = a.astype(np.intp).ravel() * classes + b.ravel()
        pairs += np.bincount(index, minlength=classes**2).reshape(classes, classes)
    both = pairs.sum(0) + pairs.sum(1)
    return (2 * pairs.diagonal() / np.where(both, both, np.nan))[1:]


def compare(
    *,
    shape: Sequence[int],
    spacing: Sequence[float],
    model_spacing: Sequence[float],
    classes: int,
    threads: int = 1,
    ways: Sequence[str] = WAYS,
) -> dict[str, Any]:
    """Measure the ways, one after the other.

    Args:
        shape: size of the scan in voxels.
        spacing: spacing of the scan in mm.
        model_spacing: spacing of the preprocessed scan in mm.
        classes: number of classes, including background.
        threads: PyTorch threads.
        ways: subset of `WAYS`.

    Returns:
        ``{"shape", "spacing", "model_shape", "model_spacing", "classes", "threads", "ways": {way: {"seconds", "peak",
        "above", "dice_mean", "dice_min", "different"}}}``. ``peak`` and ``above`` are bytes. Dice and ``different``
        (the fraction of differing voxels) are relative to the reference and only present if that was run. A way whose
        process was killed is None.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = {
            "shape": list(shape),
            "spacing": list(spacing),
            "model_spacing": list(model_spacing),
            "classes": classes,
        }
        image = _in_a_process(make_item, folder, **made)
        results: dict[str, dict[str, float] | None] = {}
        for way in ways:
            try:
                results[way] = _in_a_process(
                    run_way, way, folder, image, model_spacing=list(model_spacing), threads=threads
                )
            except BrokenProcessPool:  # killed by the system, out of memory
                results[way] = None
        if results.get(REFERENCE):
            reference = np.load(f"{folder}/{WAYS.index(REFERENCE)}.npy", mmap_mode="r")
            for way, result in results.items():
                if result:
                    labels = np.load(f"{folder}/{WAYS.index(way)}.npy", mmap_mode="r")
                    dice = dice_of_organs(labels, reference, classes=classes)
                    result |= {"dice_mean": float(np.nanmean(dice)), "dice_min": float(np.nanmin(dice))}
                    result["different"] = (
                        sum(int((a != b).sum()) for a, b in zip(labels, reference, strict=True)) / labels.size
                    )
    return {**made, "model_shape": list(image.shape[1:]), "threads": threads, "ways": results}


def _rows(results: dict[str, dict[str, float] | None]) -> list[dict[str, str]]:
    """Return the table cells of each way by column heading; ratios are relative to the reference, if that was run."""
    reference = results.get(REFERENCE)
    rows = []
    for way, result in results.items():
        if result is None:
            rows.append({"way": way, "peak\nGiB": "killed"})
            continue
        row = {"way": way, "peak\nGiB": f"{result['peak'] / GIB:.2f}", "above\nGiB": f"{result['above'] / GIB:.2f}"}
        if reference:
            row["above\nratio"] = f"{result['above'] / reference['above']:.3f}"
        row["seconds"] = f"{result['seconds']:.1f}"
        if reference:
            row["time\nratio"] = f"{result['seconds'] / reference['seconds']:.2f}"
            row["Dice\nmean"], row["Dice\nmin"] = f"{result['dice_mean']:.5f}", f"{result['dice_min']:.5f}"
            row["different\nvoxels"] = f"{result['different']:.4%}"
        rows.append(row)
    return rows


def _print_table(title: str, rows: Sequence[dict[str, str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    headings = max(rows, key=len).keys()
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(heading, "") for heading in headings))
    console = Console()
    console = Console(width=max(console.width, 120))  # do not truncate numbers in a narrow terminal
    console.print(title, style="bold", highlight=False)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mask_inversion",
        description="Compare ways of mapping predicted probabilities to a label map on the scan's own voxels.",
    )
    add = parser.add_argument
    three = {"nargs": 3, "metavar": ("X", "Y", "Z")}
    add("--shape", type=int, default=[512, 512, 300], **three, help="scan size in voxels (default: 512 512 300)")
    add("--spacing", type=float, default=[0.8, 0.8, 1.0], **three, help="scan spacing in mm (default: 0.8 0.8 1)")
    model_help = "spacing of the preprocessed scan in mm (default: 1.5 1.5 2)"
    add("--model_spacing", type=float, default=[1.5, 1.5, 2.0], **three, help=model_help)
    add("--classes", type=int, default=14, help="number of classes, including background (default: 14)")
    add("--threads", type=int, default=1, help="PyTorch threads (default: 1)")
    ways_help = f"ways to run, of: {'; '.join(WAYS)} (default: all)"
    add("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=ways_help)
    add("--json", metavar="FILE", help="write the results to FILE, in bytes and seconds")
    given = parser.parse_args(arguments)
    try:
        for name in ("shape", "spacing", "model_spacing", "threads"):
            value = getattr(given, name)
            if min(value if isinstance(value, list) else [value]) <= 0:
                raise InputError(f"--{name} {value}: must be above 0.")
        if not 2 <= given.classes <= 256:
            raise InputError(f"--classes {given.classes}: must be from 2 to 256.")
        options = {name: value for name, value in vars(given).items() if name != "json"}
        results = compare(**options)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    title = (
        f"{given.classes} classes on {' x '.join(map(str, results['model_shape']))} voxels of "
        f"{' x '.join(map('{:g}'.format, given.model_spacing))} mm, to {' x '.join(map(str, given.shape))} of "
        f"{' x '.join(map('{:g}'.format, given.spacing))} mm; {given.threads} thread{'s' * (given.threads > 1)}"
    )
    _print_table(title, _rows(results["ways"]))
    if given.json:
        write_text(given.json, json.dumps(results, indent=4) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
