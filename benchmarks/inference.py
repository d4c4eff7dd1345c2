# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare inference, from a CT in memory to its label map: this bundle against the zoo's, same weights and overlap.

    python -m benchmarks.inference                                     quick, for a CPU: preset cpu, a coarse scan
    python -m benchmarks.inference --model tiny --warmup 0             as many windows as base, but small: ten minutes
    python -m benchmarks.inference --model base --size 512 512 200     realistic size, for a GPU
    python -m benchmarks.inference --model base --size 512 512 200 --sides ours openvino zoo --runs 1 --warmup 0

Sides (they take turns, each in its own process; see `benchmarks.side_by_side`):

- *zoo*: configured as swin_unetr_btcv_segmentation 0.5.6 of MONAI's model zoo: orientation, spacing, HU window; MONAI's
  `SwinUNETR`; `SlidingWindowInferer` over the whole scan, 4 windows at once, equal weights; softmax; `Invertd` of all
  class volumes; argmax. The network is built without ``img_size``, which MONAI 1.5 removed.
- *ours*: swin_unetr_btcv_seg: the same preprocessing plus a crop to the body; the fast network; `ProbabilityInferer`
  that skips windows of air; `MaskOnScanGridd`.
- *openvino*: ours with ``--backend openvino``, on a CPU. The network is converted before, in another process, and read
  from the files that this leaves, as in every run after the first one. Not among the default sides.
- *plain*: ours with ``--fast false --skip_air false``. Its masks must equal those of *ours*.

The scan is generated. It covers 410 x 410 x 200 mm for any ``--size`` in voxels, so the number of windows is that of an
abdominal CT. Its body spans 0.86 x 0.71 of the slices, like the bounding box of patient and table in a public CT (TCIA
Colorectal-Liver-Metastases; 0.92 x 0.76 in another one). ``--scan`` uses your own scan instead. Weights are random, so
only the agreement of the masks is meaningful; ``--weights`` takes a ``model.pt`` instead. Reading and writing files is not timed on any side. On a GPU all sides
run under bfloat16 autocast.

*windows*: number of windows computed per run. *limit*: the time that the arithmetic of these windows would take at the
best rate that this machine reached in a large matrix product or convolution, in the same run. *of the limit*: limit
over the time of the whole run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SwinUNETR
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)

from benchmarks.loading.scans import make_scan
from benchmarks.side_by_side import (
    Work,
    compare,
    floor,
    in_a_process,
    limit_seconds,
    machine,
    machine_line,
    print_table,
    work,
    write_json,
)
from bundles.common.data.foreground import above_or_all
from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.run.presets import choose
from bundles.common.weights.encoder_record import FIELDS, read_record
from bundles.common.weights.loading import load_model
from bundles.segmentation.backend.choice import choose_backend
from bundles.segmentation.inference.mask_on_scan_grid import MaskOnScanGridd
from bundles.segmentation.inference.probability_inferer import ProbabilityInferer
from bundles.segmentation.models.model_record import model_labels
from bundles.segmentation.tasks.tasks import choose_task

OURS, OPENVINO, PLAIN, ZOO = SIDES = ("ours", "openvino", "plain", "zoo")
DEFAULT_SIDES = (OURS, PLAIN, ZOO)
MODELS = ("base", "small", "tiny", "cpu")
CONFIGS = Path(__file__).resolve().parents[1] / "bundles/swin_unetr_btcv_seg/configs"
CLASSES = 14
HU_WINDOW = (-175.0, 250.0)
FIELD_OF_VIEW = (410.0, 410.0, 200.0)  # mm
BODY = (0.86, 0.71, 1.5)  # ellipsoid axes relative to the scan; above 1: cut off at the top and the bottom
WINDOWS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings shared by all sides.

    Attributes:
        scan: NIfTI file.
        encoder: encoder record (`common.weights.encoder_record`).
        roi_size: window size in voxels.
        spacing: spacing of the network's input in mm.
        overlap: overlap of neighbouring windows as a fraction of the window.
        device: ``cpu`` or ``cuda``.
        folder: folder for the converted network.
        weights: a trained ``model.pt``; None: random weights.
    """

    scan: str
    encoder: Mapping[str, Any]
    roi_size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    overlap: float
    device: str
    folder: str
    weights: str | None = None


def model_values(model: str) -> dict[str, Any]:
    """Return ``encoder``, ``roi_size`` and ``spacing`` of a model by its name.

    ``base`` and ``cpu`` are the presets ``official`` and ``cpu`` of swin_unetr_btcv_seg. ``small`` is base with feature
    size 24. ``tiny`` has feature size 12 and windows of 64^3 voxels at 1.5 times the spacing, so that it has as many
    windows as base.
    """
    preset = "cpu" if model == "cpu" else "official"
    row = choose_task(task="BTCV", file=str(CONFIGS / "tasks.yaml"), preset=preset)
    values = choose(preset=preset, file=str(CONFIGS / "presets.yaml"))
    values |= {name: row[name] for name in ("roi_size", "spacing")}
    if model in ("small", "tiny"):
        values["feature_size"] = {"small": 24, "tiny": 12}[model]
    if model == "tiny":
        values |= {"roi_size": [64, 64, 64], "spacing": [2.25, 2.25, 3.0]}
    fixed = {"in_channels": 1, "patch_size": 2, "merging": "monai", "use_v2": False}
    return {
        "encoder": {field: values[field] if field in values else fixed[field] for field in FIELDS},
        "roi_size": tuple(values["roi_size"]),
        "spacing": tuple(values["spacing"]),
    }


# ---- the sides -----------------------------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """Counts the windows that a network processes."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.windows = network, 0
        if hasattr(network, "windows_at_once"):
            self.windows_at_once = network.windows_at_once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += len(x)
        return self.network(x)


def make_network(side: str, job: Job) -> torch.nn.Module:
    """Build the network of a side; the random weights are the same on all sides."""
    torch.manual_seed(0)
    encoder = job.encoder
    classes = CLASSES if job.weights is None else len(model_labels(job.weights, otherwise={}))
    stock = SwinUNETR(
        in_channels=1,
        out_channels=classes,
        **{field: encoder[field] for field in ("feature_size", "depths", "num_heads", "window_size")},
    )
    if job.weights is not None:
        load_model(stock, job.weights)
    network = stock
    if side != ZOO:
        network = build_swin_unetr(encoder, out_channels=classes, fast=side != PLAIN)
        network.load_state_dict(stock.state_dict())
    return network.eval().to(job.device)


def with_openvino(job: Job) -> torch.nn.Module:
    """Return the network as OpenVINO computes it: converted, or read from the files of an earlier conversion.

    Raises:
        InputError: OpenVINO is not installed, or its result was refused.
    """
    backend = choose_backend(
        backend="openvino", device=job.device, models=[f"{job.folder}/model.pt"], roi_size=job.roi_size
    )
    network = make_network(OPENVINO, job)
    replaced = backend(network, 0, torch.rand(1, 1, *job.roi_size, generator=torch.Generator().manual_seed(0)))
    if replaced is network:
        raise InputError("OpenVINO cannot take part: the warning above says why. Leave it out of --sides.")
    return replaced


def convert_once(job: Job, *, threads: int | None = None) -> float:
    """Convert the network for OpenVINO and keep it; return the seconds that this took, with its check."""
    if threads is not None:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    with_openvino(job)
    return time.perf_counter() - begin


def _autocast(job: Job) -> torch.autocast:
    return torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.device == "cuda")


def _to_the_grid(job: Job) -> list[Callable]:
    """Return the preprocessing that both bundles begin with."""
    low, high = HU_WINDOW
    return [
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=job.spacing, mode="bilinear"),
        ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
    ]


def _steps_of_zoo(job: Job) -> tuple[Compose, Callable, Compose]:
    preprocessing = Compose([*_to_the_grid(job), EnsureTyped("image")])
    inferer = SlidingWindowInferer(roi_size=job.roi_size, sw_batch_size=WINDOWS_AT_ONCE, overlap=job.overlap)
    back = Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True)
    return preprocessing, inferer, Compose([Activationsd("pred", softmax=True), back, AsDiscreted("pred", argmax=True)])


def _steps_of_ours(job: Job, *, skip_air: bool) -> tuple[Compose, Callable, Compose]:
    crop = CropForegroundd("image", source_key="image", select_fn=above_or_all, allow_smaller=True)
    inferer = ProbabilityInferer(
        roi_size=job.roi_size, sw_batch_size=WINDOWS_AT_ONCE, overlap=job.overlap, skip_air=skip_air
    )
    return Compose([*_to_the_grid(job), crop]), inferer, Compose([MaskOnScanGridd("pred")])


def prepare(side: str, job: Job) -> Callable[[], dict[str, Any]]:
    """Load the scan and build the network; return the function to time, from the scan to its label map.

    That function returns ``labels`` (uint8, on the scan's voxels), the number of computed ``windows`` and the
    ``seconds`` of its three parts.
    """
    loading = Compose([LoadImaged("image", image_only=True), EnsureChannelFirstd("image")])
    loaded = loading({"image": job.scan})["image"]
    network = Counting(with_openvino(job) if side == OPENVINO else make_network(side, job))
    preprocessing, inferer, postprocessing = (
        _steps_of_zoo(job) if side == ZOO else _steps_of_ours(job, skip_air=side != PLAIN)
    )
    gpu = job.device == "cuda"

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def run() -> dict[str, Any]:
        network.windows = 0
        times = [now()]
        item = preprocessing({"image": loaded})
        image = item["image"].to(job.device)
        times.append(now())
        with _autocast(job):
            item["pred"] = inferer(image[None], network)[0]
        times.append(now())
        labels = postprocessing(item)["pred"][0].cpu()
        labels = (labels.as_tensor() if isinstance(labels, MetaTensor) else labels).to(torch.uint8)
        times.append(now())
        parts = dict(zip(("before", "windows", "after"), np.diff(times).tolist(), strict=True))
        return {"labels": labels.numpy(), "windows": network.windows, "seconds": parts}

    return run


def window_work(side: str, job: Job) -> Work:
    """Count arithmetic and memory traffic of one window."""
    network, window = make_network(side, job), torch.rand(1, 1, *job.roi_size, device=job.device)
    with torch.no_grad(), _autocast(job):
        return work(lambda: network(window))


# ---- the comparison ------------------------------------------------------------------------------------------------


def measure(
    *,
    size: Sequence[int],
    model: str,
    scan: str | None = None,
    runs: int = 3,
    warmup: int = 1,
    overlap: float = 0.5,
    sides: Sequence[str] = DEFAULT_SIDES,
    weights: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> dict[str, Any]:
    """Run the sides in turns.

    Args:
        size: size of the generated scan in voxels.
        scan: NIfTI file of a CT to use instead of a generated one.
        model: one of `MODELS`.
        runs: timed rounds.
        warmup: untimed rounds before them.
        overlap: overlap of neighbouring windows, a fraction.
        sides: subset of `SIDES`.
        weights: trained ``model.pt`` with the model's preprocessing; it decides the size of the network.
        device: ``cpu`` or ``cuda``.
        threads: PyTorch threads. None: PyTorch's default.

    Returns:
        The options, ``machine``, ``floor`` (see `Floor`), ``agreement`` (the fraction of voxels on which each side
        agrees with the first) and ``dice`` (the lowest Dice of a class between both, the mean over the classes),
        ``conversion`` (seconds, None without OpenVINO), ``rows`` for `print_table`, and ``comparison`` (see
        `Comparison`). Its sides also have ``windows``, ``parts`` (seconds of the last run), ``window`` (see `Work`) and
        ``limit`` (seconds).
    """
    values = model_values(model)
    if weights is not None:
        values["encoder"] = read_record(weights)
    precision = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            scan=scan or f"{folder}/scan.nii.gz",
            overlap=overlap,
            device=device,
            folder=folder,
            weights=weights,
            **values,
        )
        if scan is None:
            spacing = [extent / voxels for extent, voxels in zip(FIELD_OF_VIEW, size, strict=True)]
            make_scan(job.scan, shape=size, seed=0, spacing=spacing, ellipsoid=BODY)
        size = list(nib.load(job.scan).shape[:3])
        best = in_a_process(floor, precision, device, threads=threads)
        windows = {side: in_a_process(window_work, side, job) for side in sides}
        conversion = in_a_process(convert_once, job, threads=threads) if OPENVINO in sides else None
        comparison = compare(
            {side: partial(prepare, side, job) for side in sides},
            reference=ZOO if ZOO in sides else sides[-1],
            runs=runs,
            warmup=warmup,
            device=device,
            threads=threads,
            results=True,
        )
    results: dict[str, Any] = {
        "size": size,
        "model": model,
        **values,
        "overlap": overlap,
        "precision": str(precision).removeprefix("torch."),
        "machine": machine(),
        "floor": asdict(best),
        "agreement": {},
        "dice": {},
        "conversion": conversion,
        "comparison": comparison.as_dict(),
    }
    first = comparison.sides[sides[0]]
    for side, measured in comparison.sides.items():
        if measured is None:
            continue
        entry, run = results["comparison"]["sides"][side], measured.result
        entry |= {"windows": run["windows"], "parts": run["seconds"], "window": asdict(windows[side])}
        entry["limit"] = limit_seconds(windows[side], best) * run["windows"]
        if first is not None:
            results["agreement"][side] = float((run["labels"] == first.result["labels"]).mean())
            dice = dice_of_classes(run["labels"], first.result["labels"])
            results["dice"][side] = {"lowest": min(dice), "mean": float(np.mean(dice))}
    results["rows"] = comparison.rows({s: e["limit"] for s, e in results["comparison"]["sides"].items() if e})
    return results


def dice_of_classes(labels: np.ndarray, others: np.ndarray) -> list[float]:
    """Return the Dice between two label maps of each class that is in either; the background, 0, is not one of them.

    Two maps of only background are equal: 1.
    """
    sizes, others_sizes = np.bincount(labels.ravel(), minlength=256), np.bincount(others.ravel(), minlength=256)
    both = np.bincount(labels[labels == others], minlength=256)
    total = (sizes + others_sizes)[1:]
    return (2 * both[1:][total > 0] / total[total > 0]).tolist() or [1.0]


def _part_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table cells of each side by column heading: windows, work, and the time of each part."""
    rows = []
    for side, entry in results["comparison"]["sides"].items():
        if entry is None:
            continue
        flops, rate = entry["window"]["flops"], entry["windows"] * entry["window"]["flops"] / entry["parts"]["windows"]
        rows.append(
            {
                "side": side,
                "windows": str(entry["windows"]),
                "GFLOP per\nwindow": f"{flops / 1e9:.4g}",
                "GB moved\nper window": f"{entry['window']['bytes'] / 1e9:.3g}",
                "before\nseconds": f"{entry['parts']['before']:.3g}",
                "windows\nseconds": f"{entry['parts']['windows']:.3g}",
                "after\nseconds": f"{entry['parts']['after']:.3g}",
                "windows\nGFLOP/s": f"{rate / 1e9:.4g}",
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its tables; return the exit status."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="Compare inference, from a CT in memory to its label map: this bundle against the zoo's bundle.",
    )
    add = parser.add_argument
    size, model = ([512, 512, 200], "base") if gpu else ([256, 256, 100], "cpu")
    size_help = f"size of the generated scan in voxels (default here: {size})"
    add("--size", type=int, nargs=3, default=size, metavar=("X", "Y", "Z"), help=size_help)
    model_help = f"size of the network, with its window and spacing (default here: {model})"
    add("--model", choices=MODELS, default=model, help=model_help)
    add("--scan", metavar="FILE", help="your own CT (NIfTI) instead of a generated one")
    add("--runs", type=int, default=3, help="timed rounds (default: 3)")
    add("--warmup", type=int, default=1, help="untimed rounds before them (default: 1)")
    add("--overlap", type=float, default=0.5, help="overlap of neighbouring windows (default: 0.5)")
    sides_help = f"sides to run (default: {' '.join(DEFAULT_SIDES)})"
    add("--sides", nargs="+", choices=SIDES, default=DEFAULT_SIDES, help=sides_help)
    add("--weights", metavar="FILE", help="trained model.pt instead of random weights (patch merging: monai)")
    device = "cuda" if gpu else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="device to run on (default: cuda if available)")
    add("--threads", type=int, help="PyTorch threads on the CPU (default: PyTorch's)")
    add("--json", metavar="FILE", help="write the results to FILE, in bytes and seconds")
    given = parser.parse_args(arguments)
    options = {name: value for name, value in vars(given).items() if name != "json"}
    try:
        if min(given.size) < 16:
            raise InputError(f"--size {given.size}: must be at least 16 voxels along each axis.")
        if given.scan and not Path(given.scan).is_file():
            raise InputError(f"--scan {given.scan} is not a file. Pass a CT as .nii or .nii.gz.")
        if given.weights and not Path(given.weights).is_file():
            raise InputError(f"--weights {given.weights} is not a file. Pass a model.pt.")
        for name, least in (("runs", 1), ("warmup", 0), ("threads", 1)):
            if (value := getattr(given, name)) is not None and value < least:
                raise InputError(f"--{name} {value}: must be {least} or more.")
        if not 0 <= given.overlap < 1:
            raise InputError(f"--overlap {given.overlap}: must be a fraction of the window, from 0 to below 1.")
        results = measure(**options)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    rows = results.pop("rows")
    best, comparison = results["floor"], results["comparison"]
    print(machine_line(results["machine"]))
    rates = "matrix product {matmul:.4g} GFLOP/s, convolution {conv:.4g} GFLOP/s, copy {copy:.4g} GB/s".format(
        **{name: rate / 1e9 for name, rate in best.items()}
    )
    print(f"{given.device}, {comparison['threads']} threads, {results['precision']}: {rates}")
    scan = f"CT of {' x '.join(map(str, results['size']))}, overlap {given.overlap:g}, {CLASSES} classes"
    print_table(rows, title=f"{given.model}, {scan}; ratios to {comparison['reference']}")
    print_table(_part_rows(results), title="time of each part (last run)")
    for side, share in list(results["agreement"].items())[1:]:
        dice = results["dice"][side]
        print(
            f"voxels with the same label as {given.sides[0]}: {side} {share:.4%}; Dice of the classes {dice['mean']:.4f}, the "
            f"lowest {dice['lowest']:.4f}"
        )
    if results["conversion"] is not None:
        print(f"conversion for OpenVINO, once per file of weights and window: {results['conversion']:.3g} s")
    if given.json:
        write_json(given.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
