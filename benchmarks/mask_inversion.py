# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What it takes to bring the probabilities of a scan back to the scan's own voxels, in memory, time and voxels.

    python -m benchmarks.mask_inversion

The scan is synthetic, as a CT scanner stores it (LPS), and preprocessed as the bundle does (orientation, spacing,
crop); its probabilities are random smooth fields. The ways back:

- *class volumes, Invertd*: all class volumes are inverted (``nearest_interp=False``), then the winner is taken. The
  reference: everything else is compared with its result.
- *label map, Invertd*: the winner is taken, then inverted (``nearest_interp=True``).
- *NativeLabelsd, linear* and *nearest*: `common.native_labels`, which gives the same as the first and the second.

Each way runs in a process of its own. *peak* is the most memory that the process had (`resource.getrusage`); *above* is
what of it came on top of PyTorch, MONAI and the probabilities. Dice is over the organs, all classes but the first. All
files are in a temporary folder: some 4 bytes for each class and voxel of the preprocessed scan.
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
from bundles.segmentation.inference.native_labels import NativeLabelsd

GIB = 2**30
REFERENCE = "class volumes, Invertd"
WAYS = (REFERENCE, "label map, Invertd", "NativeLabelsd, linear", "NativeLabelsd, nearest")
BLOB = 12  # voxels of the preprocessed scan from one random value to the next


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
    """Write the probabilities of a scan; return the preprocessed scan, of equal shape, which knows its history."""
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
    """Go one way back in this process, and write its label map; return seconds and bytes."""
    torch.set_num_threads(threads)
    item = {"image": image, "pred": MetaTensor(torch.load(f"{folder}/probabilities.pt"))}
    invert = {"keys": "pred", "transform": _preprocessing(model_spacing), "orig_keys": "image"}
    winner = AsDiscreted("pred", argmax=True)
    steps = {
        "class volumes, Invertd": [Invertd(**invert, nearest_interp=False), winner],
        "label map, Invertd": [winner, Invertd(**invert, nearest_interp=True)],
        "NativeLabelsd, linear": [NativeLabelsd("pred", mode="linear")],
        "NativeLabelsd, nearest": [NativeLabelsd("pred", mode="nearest")],
    }[way]
    before, begin = _resident_bytes(), time.perf_counter()
    labels = Compose(steps)(item)["pred"]
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    np.save(f"{folder}/{WAYS.index(way)}.npy", labels[0].numpy().astype(np.uint8))
    return {"seconds": seconds, "peak": peak, "above": peak - before}


def _resident_bytes() -> int:
    """Bytes that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_a_process(function: Any, *arguments: Any, **options: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def dice_of_organs(one: np.ndarray, other: np.ndarray, *, classes: int) -> np.ndarray:
    """Dice of the classes 1, 2, ...; NaN for one that is in neither label map."""
    pairs = np.zeros((classes, classes), dtype=np.int64)
    for a, b in zip(one, other, strict=True):  # slice by slice: indices take 8 bytes a voxel
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
    """Measure the ways back, one after the other.

    Args:
        shape: voxels of the scan.
        spacing: of the scan, in mm.
        model_spacing: of the preprocessed scan, in mm.
        classes: number of classes, background included.
        threads: of PyTorch.
        ways: which of `WAYS`.

    Returns:
        ``{"shape", "spacing", "model_shape", "model_spacing", "classes", "threads", "ways": {way: {"seconds", "peak",
        "above", "dice_mean", "dice_min", "different"}}}``: bytes; Dice against the reference, and the share of voxels
        that differ from it, where both were run. A way that its process did not survive is None.
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
            except BrokenProcessPool:  # killed by the system: out of memory
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
    """Cells of each way by their headings; ratios are to the reference, where it was run."""
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
            row["Dice\nmean"], row["Dice\nleast"] = f"{result['dice_mean']:.5f}", f"{result['dice_min']:.5f}"
            row["voxels\ndifferent"] = f"{result['different']:.4%}"
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
    console = Console(width=max(console.width, 120))  # no digit is cut off where the terminal is narrower
    console.print(title, style="bold", highlight=False)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mask_inversion",
        description="Memory and time from the probabilities of a scan to a label map on the scan's own voxels.",
    )
    add = parser.add_argument
    three = {"nargs": 3, "metavar": ("X", "Y", "Z")}
    add("--shape", type=int, default=[512, 512, 300], **three, help="voxels of the scan (default: 512 512 300)")
    add("--spacing", type=float, default=[0.8, 0.8, 1.0], **three, help="of the scan, mm (default: 0.8 0.8 1)")
    add("--model_spacing", type=float, default=[1.5, 1.5, 2.0], **three, help="preprocessed, mm (default: 1.5 1.5 2)")
    add("--classes", type=int, default=14, help="number of classes, background included (default: 14)")
    add("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=f"only these of: {'; '.join(WAYS)}")
    add("--json", metavar="FILE", help="write the numbers, in bytes and seconds")
    given = parser.parse_args(arguments)
    try:
        for name in ("shape", "spacing", "model_spacing", "threads"):
            value = getattr(given, name)
            if min(value if isinstance(value, list) else [value]) <= 0:
                raise InputError(f"--{name} {value}: give numbers above 0.")
        if not 2 <= given.classes <= 256:
            raise InputError(f"--classes {given.classes}: give 2 to 256.")
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
