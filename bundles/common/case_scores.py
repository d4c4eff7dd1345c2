# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Dice and surface Dice (NSD) of label maps in the scan's own geometry, per case and organ, and the table of them."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_surface_dice
from monai.utils import ImageMetaKey, convert_to_numpy
from scipy import ndimage

from .checkpoint_file import atomic_path
from .distributed import everyones, rank
from .input_error import InputError

METRICS = ("dice", "nsd")

logger = logging.getLogger(__name__)


def score_case(
    prediction: np.ndarray | torch.Tensor,
    truth: np.ndarray | torch.Tensor,
    *,
    labels: Mapping[int, str],
    spacing: Sequence[float],
    tolerance: float | Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """Return Dice and NSD of each organ of one case.

    NSD is the share of the surface voxels of both masks that lie within the tolerance of the other mask's surface
    (Nikolov et al., arXiv 1809.04430), every surface voxel counted alike, as `monai.metrics.compute_surface_dice` does
    by default. DeepMind's surface-distance weights them by area: close, but not equal. A mask that touches the border
    of the volume has a surface there.

    An organ in neither mask has the score NaN, to be left out of every mean; an organ in only one of them has 0. That
    is what MONAI's surface Dice does, and DeepMind's surface-distance, from which the Medical Segmentation Decathlon
    (MSD) has its NSD. MONAI's Dice differs: an organ that only the prediction has is NaN with ``ignore_empty=True``,
    which forgives false positives, and one in neither is 1 with ``ignore_empty=False``, which rewards absence.

    Each organ is scored in the bounding box of its two masks, so that memory goes with the organ, not the scan.

    Args:
        prediction: label map, integers (or floats that are whole numbers), of shape (X, Y, Z).
        truth: label map of the same shape and geometry.
        labels: organ name of each label value; other values are ignored. The background, 0, cannot be scored.
        spacing: voxel size along X, Y, Z in mm.
        tolerance: NSD tolerance in mm, one for all organs or one for each organ name.

    Returns:
        ``{organ: {"dice": float, "nsd": float}}`` in the order of ``labels``.

    Raises:
        InputError: if the shapes differ, the maps are not 3D label maps, or a label, spacing or tolerance is unusable.
    """
    prediction, truth = _label_map(prediction, "prediction"), _label_map(truth, "truth")
    if prediction.shape != truth.shape:
        raise InputError(
            f"The prediction has the shape {prediction.shape}, the truth {truth.shape}: they must be equal."
        )
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise InputError(f"spacing is {list(spacing)}: it must be three voxel sizes in mm, each above 0.")
    if not labels or min(labels) < 1:
        raise InputError(f"labels is {dict(labels)}: name at least one organ, by label values from 1 up.")

    boxes_of_prediction = ndimage.find_objects(prediction, max_label=max(labels))
    boxes_of_truth = ndimage.find_objects(truth, max_label=max(labels))
    scores = {}
    for value, organ in labels.items():
        limit = _tolerance_of(organ, tolerance)
        boxes = [box for box in (boxes_of_prediction[value - 1], boxes_of_truth[value - 1]) if box is not None]
        if len(boxes) < 2:
            score = 0.0 if boxes else math.nan
            scores[organ] = {"dice": score, "nsd": score}
            continue
        # No margin is needed: compute_surface_dice takes what lies outside for background, here as at the volume's end.
        joint = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*boxes, strict=True))
        pair = [torch.from_numpy(array[joint] == value)[None, None] for array in (prediction, truth)]
        dice = compute_dice(*pair)
        nsd = compute_surface_dice(
            *pair, class_thresholds=[limit], include_background=True, spacing=[float(s) for s in spacing]
        )
        scores[organ] = {"dice": dice.item(), "nsd": nsd.item()}
    return scores


def summarise(rows: Iterable[Mapping[str, Any]], *, organs: Iterable[str]) -> dict[str, Any]:
    """Return mean, standard deviation (divisor n) and number n of the scores of each organ, NaN left out.

    Args:
        rows: dictionaries with the keys ``label``, ``dice`` and ``nsd``, one for each case and organ.
        organs: the organ names.

    Returns:
        ``{"labels": {organ: {"dice": {"mean", "std", "n"}, "nsd": {...}}}, "mean_dice": float, "mean_nsd": float}``,
        where the last two are the means over organs of the organs' means. A mean of nothing is NaN.
    """
    rows = list(rows)
    per_organ = {
        organ: {metric: _moments([row[metric] for row in rows if row["label"] == organ]) for metric in METRICS}
        for organ in organs
    }
    overall = {
        f"mean_{metric}": _moments([moments[metric]["mean"] for moments in per_organ.values()])["mean"]
        for metric in METRICS
    }
    return {"labels": per_organ, **overall}


def case_name(image_file: str | PurePath) -> str:
    """Return the file name of an image without its folder and without ``.nii`` or ``.nii.gz``."""
    return re.sub(r"\.nii(\.gz)?$", "", PurePath(image_file).name)


def items_of(engine: Engine) -> list[dict[str, Any]]:
    """Return all that an evaluator has of each case of this iteration: one dictionary for each, output over batch.

    MONAI keeps image, label and prediction in ``engine.state.output`` and all other keys, such as a second label, in
    ``engine.state.batch``; both are lists of dictionaries after its decollating.

    Raises:
        InputError: if they are not, since the evaluator was made with ``decollate: false``.
    """
    batch, output = engine.state.batch, engine.state.output
    if not isinstance(batch, list) or not isinstance(output, list):
        raise InputError(
            f"The evaluator's batch is a {type(batch).__name__} and its output a {type(output).__name__}; both must be "
            "lists of one dictionary for each case: leave its 'decollate' true."
        )
    # An evaluator whose prepare_batch gives no target puts None for the label: the batch's is meant then.
    outputs = [{key: value for key, value in item.items() if value is not None} for item in output]
    return [{**from_batch, **item} for from_batch, item in zip(batch, outputs, strict=True)]


def image_file_of(item: Mapping[str, Any], *keys: str | None) -> str:
    """Return the file that the first of ``keys`` in a decollated item was read from (``filename_or_obj``).

    Raises:
        InputError: if none of them is a MetaTensor that knows its file.
    """
    for key in keys:
        meta = getattr(item.get(key), "meta", {})
        if meta.get(ImageMetaKey.FILENAME_OR_OBJ):
            return str(meta[ImageMetaKey.FILENAME_OR_OBJ])
    raise InputError(
        f"None of the keys {[key for key in keys if key]} of the item names its file (filename_or_obj): load them with "
        f"LoadImaged, and keep their metadata. The item's keys: {sorted(item)}."
    )


class CaseScores:
    """Handler of an evaluator: scores each case in its own geometry, and writes the table when the epoch ends.

    The evaluator must decollate (MONAI's default), and its postprocessing invert the predicted label map to the scan's
    geometry. The label file's own voxels are found beside it, in the evaluator's output or in its batch.

    At the end of the epoch the rows of all processes are gathered, cases that the distributed sampler repeated are
    dropped, and the first process writes to ``output_dir``

    - ``scores.csv``: ``case,label,dice,nsd``, one row for each case and organ, an empty field for NaN;
    - ``summary.json``: see `summarise`, with the tolerance in mm and the names of the cases; null for NaN.

    Every process has ``mean_dice``, ``mean_nsd`` and ``dice_<organ>`` in ``engine.state.metrics``. That is at
    ``EPOCH_COMPLETED``, since the loggers (MLflow, StatsHandler) read the metrics at this event: list them after it.

    Args:
        labels: organ name of each label value; text keys, as in a JSON file, are taken as numbers, and a name for the
            background 0 is left out.
        tolerance: NSD tolerance in mm, one for all organs or one for each organ name.
        output_dir: the folder of the two files.
        pred_key: key of the predicted label map, a MetaTensor (1, X, Y, Z) in the geometry of the scan.
        label_key: key of the true label map, a MetaTensor (1, X, Y, Z) of the label file's own voxels.
        image_key: key of the image, which gives the case its name.

    Raises:
        InputError: here if a label or tolerance is unusable; during the run if a case's prediction and truth differ in
            shape or orientation, or an item lacks a key.
    """

    def __init__(
        self,
        labels: Mapping[int | str, str],
        tolerance: float | Mapping[str, float],
        output_dir: str | Path,
        pred_key: str = "pred",
        label_key: str = "reference",
        image_key: str = "image",
    ) -> None:
        self.labels = {int(value): str(organ) for value, organ in labels.items() if int(value) != 0}
        self.tolerance = {organ: _tolerance_of(organ, tolerance) for organ in self.labels.values()}
        self.output_dir = Path(output_dir)
        self.pred_key = pred_key
        self.label_key = label_key
        self.image_key = image_key
        # By image file and not by case name: two folders may hold files of the same name.
        self.scores: dict[str, dict[str, dict[str, float]]] = {}

    def attach(self, engine: Engine) -> None:
        """Register the handler at an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._score)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _clear(self, engine: Engine) -> None:
        self.scores = {}

    def _score(self, engine: Engine) -> None:
        for item in items_of(engine):
            file = image_file_of(item, self.image_key, self.pred_key, self.label_key)
            prediction, truth = self._volume(item, self.pred_key, file), self._volume(item, self.label_key, file)
            _check_geometry(file, prediction, truth)
            self.scores[file] = score_case(
                prediction[0], truth[0], labels=self.labels, spacing=truth.pixdim.tolist(), tolerance=self.tolerance
            )

    def _volume(self, item: Mapping[str, Any], key: str, file: str) -> MetaTensor:
        volume = item.get(key)
        if not isinstance(volume, MetaTensor) or volume.ndim != 4 or volume.shape[0] != 1:
            found = f"{type(volume).__name__} of shape {tuple(getattr(volume, 'shape', ()))}"
            raise InputError(
                f"'{key}' of the case {file} must be a label map with its geometry, a MetaTensor of shape "
                f"(1, X, Y, Z), but is {found}: check the evaluator's postprocessing. The item's keys: {sorted(item)}."
            )
        return volume

    def _finish(self, engine: Engine) -> None:
        scores = _gather(self.scores)
        rows = [
            {"case": case, "label": organ, **score}
            for case, of_organs in _by_case_name(scores).items()
            for organ, score in of_organs.items()
        ]
        summary = summarise(rows, organs=self.labels.values())
        engine.state.metrics["mean_dice"] = summary["mean_dice"]
        engine.state.metrics["mean_nsd"] = summary["mean_nsd"]
        for organ, moments in summary["labels"].items():
            engine.state.metrics["dice_" + re.sub(r"\W+", "_", organ)] = moments["dice"]["mean"]

        if rank() == 0:
            summary |= {"tolerance": self.tolerance, "cases": sorted({row["case"] for row in rows})}
            self._write(rows, summary)
            logger.info("%s", format_summary(summary))

    def _write(self, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        with atomic_path(self.output_dir / "scores.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["case", "label", *METRICS], lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow(row | {m: "" if math.isnan(row[m]) else f"{row[m]:.6f}" for m in METRICS})
        with atomic_path(self.output_dir / "summary.json") as path:
            path.write_text(json.dumps(_nan_to_none(summary), indent=4, allow_nan=False) + "\n", encoding="utf-8")


def format_summary(summary: Mapping[str, Any]) -> str:
    """Return the summary of an evaluation as a table of plain lines, which a log file keeps readable.

    Args:
        summary: what `summarise` returns, with ``cases`` and ``tolerance`` (mm for each organ) beside.
    """
    organs = summary["labels"]
    width = max(len("organ"), *(len(organ) for organ in organs))
    lines = [
        f"Scores of {len(summary['cases'])} cases (mean and standard deviation over n cases; NSD tolerance in mm):",
        f"{'organ':<{width}}  {'Dice':>6}  {'std':>6}  {'n':>4}  {'NSD':>6}  {'std':>6}  {'n':>4}  {'tol.':>5}",
    ]
    for organ, moments in organs.items():
        cells = [f"{m['mean']:6.4f}  {m['std']:6.4f}  {m['n']:4d}" for m in (moments["dice"], moments["nsd"])]
        lines.append(f"{organ:<{width}}  {cells[0]}  {cells[1]}  {summary['tolerance'][organ]:5.2f}")
    lines.append(f"{'mean':<{width}}  {summary['mean_dice']:6.4f}  {'':6}  {'':4}  {summary['mean_nsd']:6.4f}")
    return "\n".join(lines)


def _label_map(array: np.ndarray | torch.Tensor, role: str) -> np.ndarray:
    array = convert_to_numpy(array)
    if array.ndim != 3:
        raise InputError(f"The {role} has the shape {array.shape}: it must be one label map of shape (X, Y, Z).")
    if array.dtype == bool:
        return array.view(np.uint8)
    if np.issubdtype(array.dtype, np.integer):
        return array
    whole = array.astype(np.int32)
    if not np.array_equal(whole, array):
        raise InputError(f"The {role} is no label map: it holds values such as {array[whole != array][0]}.")
    return whole


def _tolerance_of(organ: str, tolerance: float | Mapping[str, float]) -> float:
    if isinstance(tolerance, Mapping):
        if organ not in tolerance:
            raise InputError(f"tolerance names no value for '{organ}', only for {sorted(tolerance)}: add it, in mm.")
        tolerance = tolerance[organ]
    if not math.isfinite(tolerance) or tolerance < 0:
        raise InputError(f"The NSD tolerance of '{organ}' is {tolerance}: it must be a number of mm, 0 or above.")
    return float(tolerance)


def _check_geometry(file: str, prediction: MetaTensor, truth: MetaTensor) -> None:
    shapes = tuple(prediction.shape[1:]), tuple(truth.shape[1:])
    if shapes[0] != shapes[1]:
        raise InputError(
            f"The prediction of case {case_name(file)} has the shape {shapes[0]}, its label file {shapes[1]}: both "
            f"must be the voxels of the scan {file}. Check that the label belongs to the scan, and that the "
            "postprocessing inverts the preprocessing."
        )
    # Equal shapes hide a flipped axis. Only the orientation is compared, as the headers of a scan and its label often
    # differ a little in origin and rotation.
    axes = ["".join(nib.aff2axcodes(volume.affine.numpy(force=True))) for volume in (prediction, truth)]
    if axes[0] != axes[1]:
        raise InputError(
            f"The prediction of case {case_name(file)} lies in {axes[0]} orientation, its label file in {axes[1]}: the "
            f"voxels do not correspond. Both must be in the orientation of the scan {file}."
        )


def _gather(scores: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of all processes; a file that several of them scored comes once."""
    return dict(everyones(list(scores.items())))


def _by_case_name(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Sort by case name; cases of one name in several folders keep their folders."""
    names = [case_name(file) for file in scores]
    unique = {
        file: name if names.count(name) == 1 else str(PurePath(file).with_name(name))
        for file, name in zip(scores, names, strict=True)
    }
    return {unique[file]: scores[file] for file in sorted(scores, key=lambda file: unique[file])}


def _moments(values: Iterable[float]) -> dict[str, float | int]:
    present = [value for value in values if not math.isnan(value)]
    if not present:
        return {"mean": math.nan, "std": math.nan, "n": 0}
    return {"mean": float(np.mean(present)), "std": float(np.std(present)), "n": len(present)}


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
