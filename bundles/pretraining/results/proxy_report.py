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
from ...common.run.options import check_choice

logger = logging.getLogger(__name__)

HIGHER_IS_BETTER = {
    "loss": False,
    "loss_inpainting": False,
    "loss_contrast": False,
    "loss_rotation": False,
    "rotation_accuracy": True,
    "contrast_top1": True,
    "masked_psnr": True,
    "probe_dice": True,
}
TASK_OF = {"rotation_accuracy": "rotation", "contrast_top1": "contrast", "masked_psnr": "inpainting"}
UNLEARNT = "contrast_without_learning"  # in the report: loss_contrast if all crops have the same embedding
NOT_PER_VIEW = ("views", "squared_error", "masked_voxels", UNLEARNT)
COLLAPSED = 0.005  # if loss_contrast is less than this (nats) below the loss of equal embeddings, nothing was learnt


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
    if task != "loss" and task not in tasks:
        raise InputError(f"--select_by {select_by} belongs to {task}, which is not one of the --tasks {list(tasks)}.")
    return HIGHER_IS_BETTER[select_by]


class ProxyInferer(SimpleInferer):
    """Run all heads, also in eval mode, in which the network itself returns only the reconstruction."""

    def __call__(
        self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        return unwrap(network).proxy_outputs(inputs)


def measure(
    outputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], loss: torch.nn.Module
) -> dict[str, float]:
    """Return sums over one batch of 2B views.

    To be divided by ``views``: ``loss``, ``loss_<task>``, ``rotation_accuracy`` (chance level 0.25), ``contrast_top1``
    (the partner is the nearest of the other 2B - 1 views) and ``contrast_without_learning``, the value of
    ``loss_contrast`` if all crops have the same embedding, ln(2B - 1). To be divided by ``masked_voxels``:
    ``squared_error`` of the masked voxels, intensities in [0, 1].
    """
    views = len(targets["turns"])
    values = {"loss": loss(outputs, targets), **{f"loss_{name}": value for name, value in loss.parts.items()}}
    if "rotation" in outputs:
        values["rotation_accuracy"] = (outputs["rotation"].argmax(1) == targets["turns"]).float().mean()
    if "contrast" in outputs:
        similarity, partner = loss.contrast.logits(*outputs["contrast"].chunk(2))
        values["contrast_top1"] = (similarity.argmax(1) == partner).float().mean()
        values[UNLEARNT] = math.log(similarity.shape[1] - 1)
    sums = {"views": float(views)} | {name: float(value) * views for name, value in values.items()}
    if "inpainting" in outputs:
        hidden = targets["mask"].expand_as(targets["crop"])
        squared = (outputs["inpainting"].float() - targets["crop"]).square()
        sums |= {"squared_error": float((squared * hidden).sum()), "masked_voxels": float(hidden.sum())}
    return sums


class ProxyReport:
    """Handler for `SupervisedEvaluator`: means over all views and ranks, in ``engine.state.metrics`` and in the log.

    The metrics are those of `measure`, with ``masked_psnr`` (dB, peak 1, over all masked voxels) instead of the squared
    error.

    Args:
        loss: `losses.ProxyTaskLoss`.
        path: JSON file for the report, or None. It has ``views``, the metrics, and ``contrast_without_learning``, the
            contrastive loss (nats) of equal embeddings in the same batches.
    """

    def __init__(self, *, loss: torch.nn.Module, path: str | None = None) -> None:
        self.loss = loss
        self.path = path
        self.batches: dict[int, dict[str, float]] = {}  # sums by first draw: a batch that two ranks process counts once

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
        ordered = [batches[draw] for draw in sorted(batches)]
        sums = {name: sum(batch[name] for batch in ordered) for name in ordered[0]}
        metrics = {name: value / sums["views"] for name, value in sums.items() if name not in NOT_PER_VIEW}
        if "squared_error" in sums:
            voxels = sums["masked_voxels"]  # 0 if nothing is masked
            metrics["masked_psnr"] = (
                -10 * math.log10(max(sums["squared_error"] / voxels, 1e-12)) if voxels else math.nan
            )
        engine.state.metrics.update(metrics)
        if rank() == 0:
            values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            logger.info("validation over %d views  %s", int(sums["views"]), values)
            report = {"views": int(sums["views"]), **metrics}
            if UNLEARNT in sums:
                report[UNLEARNT] = sums[UNLEARNT] / sums["views"]
            if UNLEARNT in report and metrics["loss_contrast"] > report[UNLEARNT] - COLLAPSED:
                logger.warning(
                    "loss_contrast %.4f: all crops still have the same embedding (ln of the other views: %.4f). This "
                    "is normal early in training. If it does not change, start again with a longer --warmup_steps (a "
                    "quarter of --max_steps), and if that does not help, half the --learning_rate",
                    metrics["loss_contrast"],
                    report[UNLEARNT],
                )
            if self.path is not None:
                with atomic_path(Path(self.path)) as temporary:
                    temporary.write_text(json.dumps(report, indent=2) + "\n")
