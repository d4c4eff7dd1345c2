# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Measure the proxy tasks of an encoder: losses and accuracies over fixed validation views."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.inferers import SimpleInferer

from ...common.errors import InputError
from ...common.files import atomic_path
from ...common.run.distributed import gather_lists, rank, unwrap
from ...common.value_rules import check_choice
from ..proxy_tasks.position import residuals
from .learning import CONTRAST_ERROR, UNLEARNT, describe, effective_rank, verdicts

logger = logging.getLogger(__name__)

HIGHER_IS_BETTER = {
    "loss": False,
    "loss_inpainting": False,
    "loss_contrast": False,
    "loss_rotation": False,
    "rotation_accuracy": True,
    "contrast_top1": True,
    "masked_psnr": True,
    "loss_position": False,
    "position_mm": False,
    "effective_rank": True,
    "probe_dice": True,
}
TASK_OF = {
    "rotation_accuracy": "rotation",
    "contrast_top1": "contrast",
    "masked_psnr": "inpainting",
    "position_mm": "position",
}
EVERY_TASK = ("loss", "effective_rank")
AXES = ("x", "y", "z")


def higher_is_better(select_by: str, tasks: Sequence[str], *, probed: bool = False) -> bool:
    """Return whether higher values of a metric of the report, or of the probe, are better.

    Raises:
        InputError: there is no such metric, its task is not in use, or it is that of the probe without a probe.
    """
    check_choice(name="select_by", value=select_by, choices=list(HIGHER_IS_BETTER))
    if select_by == "probe_dice":
        if not probed:
            raise InputError("--select_by probe_dice needs a probe: name its labelled scans with --probe_list.")
        return HIGHER_IS_BETTER[select_by]
    task = TASK_OF.get(select_by, select_by.removeprefix("loss_"))
    if task not in (*EVERY_TASK, *tasks):
        raise InputError(f"--select_by {select_by} belongs to {task}, which is not one of the --tasks {list(tasks)}.")
    return HIGHER_IS_BETTER[select_by]


class ProxyInferer(SimpleInferer):
    """Run all heads, also in eval mode, in which the network itself returns only the reconstruction."""

    def __call__(
        self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        return unwrap(network).proxy_outputs(inputs, embedding=True)


def _voxels(values: torch.Tensor, inside: torch.Tensor) -> dict[str, float]:
    """Return the number, sum and sum of squares of the values inside, in double precision."""
    inside = inside.expand_as(values)
    values = torch.where(inside, values.float(), 0).double()
    return {"number": float(inside.sum()), "sum": float(values.sum()), "squares": float(values.square().sum())}


def measure(outputs: dict[str, torch.Tensor], targets: dict[str, Any], loss: torch.nn.Module) -> dict[str, Any]:
    """Return the figures of one batch as sums, by what they are to be divided by.

    - ``views``: ``loss``, ``loss_<task>``, ``rotation_accuracy`` (chance level 0.25), ``contrast_top1`` (the partner is
      the nearest of the other 2B - 1 views) and ``contrast_without_learning``, the value of ``loss_contrast`` if all
      crops have the same embedding, ln(2B - 1).
    - ``contrast_of_crops``: the contrast loss of each crop.
    - ``masked``: sums over the masked voxels: of the ``target``, intensities in [0, 1], and of the ``error``.
    - ``body``: sums over the body voxels: absolute errors of the position in mm by axis, of the network (``predicted``)
      and of a ``constant``, after the mean of each scan is subtracted.
    """
    views = len(targets["turns"]) if "turns" in targets else len(targets["position"])
    values = {"loss": loss(outputs, targets), **{f"loss_{name}": value for name, value in loss.parts.items()}}
    if "rotation" in outputs:
        values["rotation_accuracy"] = (outputs["rotation"].argmax(1) == targets["turns"]).float().mean()
    if "contrast" in outputs:
        similarity, partner = loss.contrast.logits(*outputs["contrast"].chunk(2))
        values["contrast_top1"] = (similarity.argmax(1) == partner).float().mean()
        values[UNLEARNT["contrast"]] = math.log(similarity.shape[1] - 1)
    sums: dict[str, Any] = {"number": views, "views": {name: float(value) * views for name, value in values.items()}}
    if "contrast" in outputs:  # of each crop: the mean over its two views
        of_crops = torch.stack(
            torch.nn.functional.cross_entropy(similarity.float(), partner, reduction="none").chunk(2)
        )
        sums["contrast_of_crops"] = of_crops.mean(0).double().tolist()
    if "inpainting" in outputs:
        error = outputs["inpainting"].float() - targets["crop"].float()
        sums["masked"] = {"error": _voxels(error, targets["mask"]), "target": _voxels(targets["crop"], targets["mask"])}
    if "position" in outputs:
        scene = targets["position"], targets["body"], targets["crops_per_scan"]
        predictions = {"predicted": outputs["position"], "constant": torch.zeros_like(outputs["position"])}
        errors = {name: residuals(each, *scene).abs().double() for name, each in predictions.items()}
        sums["body"] = {
            "number": float(targets["body"].sum()),
            **{name: [float(value) for value in error.sum(dim=(0, 2, 3, 4))] for name, error in errors.items()},
        }
    if "embedding" in outputs:
        sums["embedding"] = outputs["embedding"].float().cpu().numpy()
    return sums


def _psnr(mean_square: float) -> float:
    return -10 * math.log10(max(mean_square, 1e-12))


def metrics_of(batches: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of a validation, and what some of them are without learning (`learning.UNLEARNT`).

    Args:
        batches: results of `measure`.
    """
    views = sum(batch["number"] for batch in batches)
    metrics = {name: sum(batch["views"][name] for batch in batches) / views for name in batches[0]["views"]}
    unlearnt = {name: metrics.pop(name) for name in UNLEARNT.values() if name in metrics}
    if "contrast_of_crops" in batches[0]:
        of_crops = torch.tensor(
            [value for batch in batches for value in batch["contrast_of_crops"]], dtype=torch.float64
        )
        unlearnt[CONTRAST_ERROR] = float(of_crops.std() / len(of_crops) ** 0.5) if len(of_crops) > 1 else math.nan
    if "masked" in batches[0]:

        def total(of: str, what: str) -> float:
            return sum(batch["masked"][of][what] for batch in batches)

        if number := total("error", "number"):
            metrics["masked_psnr"] = _psnr(total("error", "squares") / number)
            spread = total("target", "squares") / number - (total("target", "sum") / number) ** 2
            unlearnt[UNLEARNT["inpainting"]] = _psnr(spread)
        else:  # nothing is masked
            metrics["masked_psnr"] = math.nan
    if "body" in batches[0]:
        number = sum(batch["body"]["number"] for batch in batches)
        means = {
            name: [
                sum(batch["body"][name][axis] for batch in batches) / number if number else math.nan
                for axis in range(3)
            ]
            for name in ("predicted", "constant")
        }
        metrics["position_mm"] = sum(means["predicted"]) / 3
        metrics |= {f"position_mm_{axis}": mean for axis, mean in zip(AXES, means["predicted"], strict=True)}
        unlearnt[UNLEARNT["position"]] = sum(means["constant"]) / 3
    if "embedding" in batches[0]:
        metrics["effective_rank"] = effective_rank(
            torch.cat([torch.from_numpy(batch["embedding"]) for batch in batches])
        )
    return metrics, unlearnt


class ProxyReport:
    """Handler for `SupervisedEvaluator`: metrics over all views and ranks, in ``engine.state.metrics`` and in the log.

    The metrics are those of `metrics_of`: ``loss``, ``loss_<task>``, ``rotation_accuracy``, ``contrast_top1``,
    ``masked_psnr`` (dB, peak 1, over all masked voxels), ``position_mm`` (mean absolute error over axes and body
    voxels) and ``position_mm_x``, ``_y``, ``_z``, and ``effective_rank`` (`learning.effective_rank`).

    Args:
        loss: `losses.ProxyTaskLoss`.
        path: JSON file for the report, or None. It has ``views``, the metrics, what some of them are without learning
            (`learning.UNLEARNT`), and ``verdicts`` (`learning.verdicts`).
    """

    def __init__(self, *, loss: torch.nn.Module, path: str | None = None) -> None:
        self.loss = loss
        self.path = path
        self.batches: dict[int, dict[str, Any]] = {}  # by first draw: a batch that two ranks process counts once
        self.verdicts: dict[str, dict[str, Any]] = {}  # verdicts of the last validation

    def saved_verdicts(self) -> dict[str, dict[str, Any]]:
        """Return the verdicts of the report file; none without a file."""
        if self.path is None or not Path(self.path).is_file():
            return {}
        return json.loads(Path(self.path).read_text(encoding="utf-8")).get("verdicts", {})

    def attach(self, engine: Engine) -> None:
        """Register the handlers for an epoch of the evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.batch_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Reset the sums."""
        self.batches = {}

    def batch_completed(self, engine: Engine) -> None:
        """Measure a batch."""
        output = engine.state.output
        with torch.no_grad():
            draw = int(engine.state.batch["draw"][0])
            self.batches[draw] = measure(output["pred"], output["label"], self.loss)

    def completed(self, engine: Engine) -> None:
        """Compute the metrics; report them on rank 0."""
        batches = dict(gather_lists(list(self.batches.items())))
        metrics, unlearnt = metrics_of([batches[draw] for draw in sorted(batches)])
        engine.state.metrics.update(metrics)
        views = sum(batch["number"] for batch in batches.values())
        report = {"views": views, **metrics, **unlearnt}
        self.verdicts = verdicts(report)
        if rank() > 0:
            return
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logger.info("validation over %d views  %s", views, values)
        for line, each in zip(describe(self.verdicts), self.verdicts.values(), strict=True):
            if not each["learnt"]:
                logger.warning("%s. This is normal early in training", line)
        if self.path is not None:
            with atomic_path(Path(self.path)) as temporary:
                known = {name: value if math.isfinite(value) else None for name, value in report.items()}
                content = {**known, "verdicts": self.verdicts}
                temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
