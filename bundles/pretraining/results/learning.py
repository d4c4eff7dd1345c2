# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Report whether each proxy task was learnt: compare a validation with the scores of a network that learnt nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from scipy.stats import binomtest
from scipy.stats import t as student

from ...common.run.distributed import rank
from ...common.words import counted, listed

logger = logging.getLogger(__name__)

SIGNIFICANCE = 0.05  # level of the rotation's binomial test, and of the contrast's t test
CONTRAST_MARGIN = 0.05  # nats below the loss of equal embeddings
PSNR_MARGIN = 0.5  # dB above the best constant
POSITION_SHARE = 0.9  # share of the error of a constant
CONTRAST_ERROR = "contrast_standard_error"  # entry of validation.json: standard error of the loss over the crops
# Entries of validation.json: what a metric is if nothing was learnt.
UNLEARNT = {
    "contrast": "contrast_without_learning",
    "inpainting": "masked_psnr_of_a_constant",
    "position": "position_mm_of_a_constant",
}


def effective_rank(embeddings: torch.Tensor) -> float:
    """Return the effective rank of embeddings (N, features): 1 if all point the same way, at most N.

    It is the exponential of the entropy of the singular values, which are divided by their sum (Roy and Vetterli,
    EUSIPCO 2007). Embeddings are not centred, as in RankMe (Garrido et al., ICML 2023): a common vector counts. NaN if
    any number is not finite: the training diverged.
    """
    if not torch.isfinite(embeddings).all():
        return math.nan
    values = torch.linalg.svdvals(embeddings.double())
    share = values / values.sum().clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))


def verdicts(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each task in a report of `ProxyReport`, ``learnt`` (bool) and ``because`` (text with the figures).

    - rotation: more angles are right than by chance (25%), by a one-sided binomial test at 5%;
    - contrast: the loss is at least 0.05 nats below that of equal embeddings, and by a one-sided t test at 5% over the
      crops not by chance: the embeddings of an untrained network differ, and of a few crops some lie well by luck;
    - inpainting: the PSNR inside the masks is at least 0.5 dB above that of the best constant;
    - position: the error is less than 90% of that of a constant.
    """
    found = {}
    if "rotation_accuracy" in report:
        views, share = report["views"], report["rotation_accuracy"]
        chance = binomtest(round(share * views), views, 0.25, alternative="greater").pvalue
        found["rotation"] = {
            "learnt": bool(chance < SIGNIFICANCE),
            "because": f"{share:.0%} of {views} angles are right, 25% by chance (p {chance:.2g})",
        }
    if (unlearnt := report.get(UNLEARNT["contrast"])) is not None:
        loss, crops = _number(report, "loss_contrast"), report["views"] // 2
        learnt = loss < unlearnt - CONTRAST_MARGIN
        because = f"the loss is {loss:.2f}, that of equal embeddings {unlearnt:.2f}"
        if (error := report.get(CONTRAST_ERROR)) is not None:
            chance = float(student.sf((unlearnt - loss) / max(error, 1e-12), crops - 1)) if crops > 1 else 1.0
            learnt = learnt and chance < SIGNIFICANCE
            because += f" (p {chance:.2g} over {counted(crops, 'crop')})"
        found["contrast"] = {"learnt": bool(learnt), "because": because}
    if (constant := report.get(UNLEARNT["inpainting"])) is not None:
        psnr = _number(report, "masked_psnr")
        found["inpainting"] = {
            "learnt": bool(psnr > constant + PSNR_MARGIN),
            "because": f"the PSNR inside the masks is {psnr:.1f} dB, that of the best constant {constant:.1f} dB",
        }
    if (constant := report.get(UNLEARNT["position"])) is not None:
        error = _number(report, "position_mm")
        found["position"] = {
            "learnt": bool(error < POSITION_SHARE * constant),
            "because": f"the error is {error:.0f} mm, that of a constant {constant:.0f} mm",
        }
    return found


def _number(report: Mapping[str, Any], name: str) -> float:
    """Return a figure of a report; NaN where its file has null."""
    value = report.get(name)
    return math.nan if value is None else value


def describe(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line per task."""
    return [
        f"{task}: {'learnt' if each['learnt'] else 'NOT LEARNT'}, {each['because']}" for task, each in found.items()
    ]


class LearningVerdict:
    """Handler for `SupervisedTrainer`: the last lines of a run say which proxy tasks were learnt.

    Add it after `TrainingCheckpoint`.

    Args:
        report: `ProxyReport` of the validation, or None.
    """

    def __init__(self, *, report: Any) -> None:
        self.report = report

    def attach(self, engine: Engine) -> None:
        """Register the handler, on rank 0."""
        if rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        found = self.report.verdicts or self.report.saved_verdicts()  # a run that had nothing left to do
        for line, each in zip(describe(found), found.values(), strict=True):
            logger.log(logging.INFO if each["learnt"] else logging.WARNING, line)
        failed = [task for task, each in found.items() if not each["learnt"]]
        if failed:
            logger.warning(
                "This pre-training did not learn %s, or has too few validation views to show it (--validation_draws). What to "
                "change: docs/README.md of the bundle, 'If a task is not learnt'",
                listed(failed),
            )
        elif found:
            logger.info("This pre-training learnt all its tasks: %s", ", ".join(found))
