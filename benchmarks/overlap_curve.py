# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Dice and time of a trained network over the overlap and the arithmetic of its windows: which time is well spent.

    python -m benchmarks.overlap_curve DATA --weights model.pt
    python -m benchmarks.overlap_curve DATA --weights model.pt --overlaps 0.5 --backends openvino openvino_bf16 int8

``DATA`` is a folder with a ``dataset.json``; its labelled cases of ``--section`` (by default those that the training of the
model held out) are segmented once for each overlap and backend, with spacing, window and intensities of the model's
training. They take turns within a case. *windows*: of all cases. *time*: of windows and blending, relative to the first
row. *Dice*: mean over the organs that the label of a case has, and over the cases, on the scan's own voxels. *largest change*: of a
case's Dice, against the same overlap with the first backend. *same voxels*: share of the voxels with the label that the
first backend gives with the largest overlap.

``int8``: OpenVINO with the convolutions in 8-bit integers (`benchmarks.int8`), calibrated on windows of the training
cases. It needs NNCF and is not a backend of the bundles; docs/explanation/speed.md says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPad,
)

from benchmarks.inference import Counting, dice_of_classes
from benchmarks.int8 import draw_windows, load_nncf, quantized
from benchmarks.side_by_side import print_table, write_json
from bundles.common.data.data_list import segmentation_scans
from bundles.common.data.foreground import above_or_all
from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.encoder_record import read_record
from bundles.common.weights.loading import load_model
from bundles.common.weights.recorded_preset import training_of
from bundles.common.words import counted
from bundles.segmentation.backend.choice import choose_backend
from bundles.segmentation.backend.openvino_network import OpenVinoNetwork, convert
from bundles.segmentation.inference.mask_on_scan_grid import MaskOnScanGridd
from bundles.segmentation.inference.probability_inferer import ProbabilityInferer
from bundles.segmentation.models.model_record import model_labels, model_split

OVERLAPS = (0.0, 0.25, 0.5, 0.625, 0.75)
INT8 = "int8"
BACKENDS = ("torch", "openvino", "openvino_bf16", INT8)
CALIBRATION = (8, 2)  # cases, and windows of each


@dataclass
class Point:
    """What one overlap gave with one backend.

    Attributes:
        windows: windows computed in all cases.
        seconds: seconds of windows and blending, in all cases.
        dice: Dice of each case, the mean over the organs that its label has.
        same: share of the voxels of each case with the label of the largest overlap with the first backend.
    """

    windows: int = 0
    seconds: float = 0.0
    dice: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)


def preprocessing(trained: Mapping[str, Any]) -> Compose:
    """Return the preprocessing of inference.yaml with the values that a model records."""
    window = trained["hu_window"]
    steps = [
        LoadImaged("image", image_only=True),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=trained["spacing"], mode="bilinear"),
        CropForegroundd(
            "image",
            source_key="image",
            select_fn=lambda image: above_or_all(image, other=trained["foreground"]),
            allow_smaller=True,
        ),
        NormalizeIntensityd("image", nonzero=True, channel_wise=True)
        if window is None
        else ScaleIntensityRanged("image", a_min=window[0], a_max=window[1], b_min=0.0, b_max=1.0, clip=True),
    ]
    return Compose(steps)


@torch.no_grad()
def curve(
    cases: Sequence[Mapping[str, str]],
    *,
    weights: str,
    overlaps: Sequence[float],
    backends: Sequence[str] = ("torch",),
    calibration: Sequence[Mapping[str, str]] = (),
) -> dict[tuple[str, float], Point]:
    """Segment the cases with each backend and overlap.

    Args:
        cases: ``{"image": file, "label": file}``.
        weights: ``model.pt`` of a training of these bundles.
        overlaps: shares of the window.
        backends: see `BACKENDS`.
        calibration: training cases, for ``int8``.

    Raises:
        InputError: the file does not record its training.
    """
    trained = training_of(weights)
    if not trained or not {"spacing", "hu_window", "roi_size", "foreground"} <= trained.keys():
        raise InputError(f"--weights {weights} does not record its preprocessing. Pass a model.pt of a training.")
    network = build_swin_unetr(read_record(weights), out_channels=len(model_labels(weights, otherwise={}))).eval()
    load_model(network, weights)
    prepare, to_scan, roi_size = preprocessing(trained), MaskOnScanGridd("pred"), trained["roi_size"]
    networks: dict[str, Counting] = {}
    points = {(backend, overlap): Point() for backend in backends for overlap in overlaps}
    for case in cases:
        item = prepare({"image": case["image"]})
        image, truth = item["image"][None], np.asarray(nib.load(case["label"]).dataobj).astype(np.uint8)
        for backend in backends if not networks else ():
            if backend == INT8:
                pad = SpatialPad(roi_size)
                images = [pad(prepare({"image": each["image"]})["image"]) for each in calibration[: CALIBRATION[0]]]
                windows = [
                    window.as_tensor()
                    for number, each in enumerate(images)
                    for window in draw_windows(each, roi_size, number=CALIBRATION[1], seed=number)
                ]
                model = quantized(convert(network, channels=len(images[0]), roi_size=roi_size), windows)
                networks[backend] = Counting(OpenVinoNetwork(model))
            else:
                chosen = choose_backend(backend=backend, device="cpu", models=[weights], roi_size=roi_size)
                networks[backend] = Counting(network if chosen is None else chosen(network, 0, image))
        masks = {}
        for (backend, overlap), point in points.items():
            inferer = ProbabilityInferer(roi_size=roi_size, sw_batch_size=4, overlap=overlap)
            networks[backend].windows, begin = 0, time.perf_counter()
            pred = inferer(image, networks[backend])[0]
            point.seconds += time.perf_counter() - begin
            point.windows += networks[backend].windows
            mask = to_scan({"image": item["image"], "pred": pred})["pred"][0]
            masks[backend, overlap] = mask.numpy().astype(np.uint8)
        for key, point in points.items():
            point.dice.append(mean_dice(masks[key], truth))
            point.same.append(float((masks[key] == masks[backends[0], max(overlaps)]).mean()))
    return points


def mean_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean Dice over the labels above 0 that ``truth`` has; NaN if it has none."""
    if not truth.any():
        return float("nan")
    return float(np.mean(dice_of_classes(np.where(np.isin(mask, truth), mask, 0), truth)))


def rows_of(points: Mapping[tuple[str, float], Point]) -> list[dict[str, str]]:
    """Return table cells by column heading, one row per backend and overlap."""
    reference, _ = next(iter(points))
    first = next(iter(points.values()))
    return [
        {
            "backend": backend,
            "overlap": f"{overlap:g}",
            "windows": str(point.windows),
            "time": f"{point.seconds / first.seconds:.2f}",
            "Dice": f"{np.mean(point.dice):.4f}",
            "largest change": f"{np.abs(np.subtract(point.dice, points[reference, overlap].dice)).max():.4f}",
            "same voxels": f"{np.mean(point.same):.3%}",
        }
        for (backend, overlap), point in points.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap_curve",
        description="Dice and time of a trained network over the overlap of its windows.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with dataset.json")
    add("--weights", metavar="FILE", required=True, help="model.pt of a training")
    add("--section", default="validation", help="section of the data list (default: validation)")
    add("--overlaps", type=float, nargs="+", default=OVERLAPS, help="shares of the window (default: %(default)s)")
    add("--backends", choices=BACKENDS, nargs="+", default=["torch"], help="what computes the windows (default: torch)")
    add("--cases", type=int, help="the first CASES of the section (default: all)")
    add("--threads", type=int, help="threads (default: PyTorch's)")
    add("--json", metavar="FILE", help="write the results to FILE")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        if not all(0 <= overlap < 1 for overlap in given.overlaps):
            raise InputError(f"--overlaps {given.overlaps}: each must be a share of the window, from 0 to below 1.")
        split = model_split(given.weights, fold=None, folds=None, seed=None)
        cases = segmentation_scans(given.data, section=given.section, **split)[: given.cases]
        calibration: list[dict[str, str]] = []
        if INT8 in given.backends:
            load_nncf()
            calibration = segmentation_scans(given.data, section="training", **split)
        points = curve(
            cases, weights=given.weights, overlaps=given.overlaps, backends=given.backends, calibration=calibration
        )
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    title = f"{counted(len(cases), 'case')}; time relative to the first row"
    print_table(rows_of(points), left=("backend", "overlap"), title=title)
    if given.json:
        write_json(given.json, {f"{backend} {overlap}": vars(point) for (backend, overlap), point in points.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
