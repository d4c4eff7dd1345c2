# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Log one line per validation, and measure each organ."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from ignite.engine import Engine, Events

from ...common.run.distributed import rank
from ...common.words import counted
from ..models.label_names import organ_names

logger = logging.getLogger(__name__)

PREFIX = "dice_"  # prefix of the metric of an organ


class OrganDice:
    """Handler for `SupervisedEvaluator`: puts the mean Dice of each organ into its metrics, as ``dice_<organ>``.

    An organ that no validation case has is left out. Add it before handlers that read the metrics.

    Args:
        metric: name of a `MeanDice` without background, which keeps the Dice of each case and organ.
        labels: organ name of each label value.
    """

    def __init__(self, *, metric: str, labels: Mapping[int | str, str]) -> None:
        self.metric = metric
        self.organs = list(organ_names(labels).values())

    def attach(self, engine: Engine) -> None:
        """Measure after the metrics have been computed, on all ranks."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        of_cases = engine.state.metric_details[self.metric]  # (cases, organs), of all ranks
        for organ, mean in zip(self.organs, torch.nanmean(of_cases, dim=0).tolist(), strict=True):
            if mean == mean:
                engine.state.metrics[PREFIX + re.sub(r"\W+", "_", organ)] = mean


class ValidationLine:
    """Handler for `SupervisedEvaluator`: logs a metric at the end of each validation, on rank 0, and which organs of
    `OrganDice` have a Dice of 0 in every case.

    Args:
        metric: the metric's name in ``engine.state.metrics``.
    """

    def __init__(self, *, metric: str) -> None:
        self.metric = metric

    def attach(self, engine: Engine) -> None:
        """Log after the metrics have been computed."""
        if rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        metrics = engine.state.metrics
        of_organs = {name.removeprefix(PREFIX): dice for name, dice in metrics.items() if name.startswith(PREFIX)}
        missed = [organ for organ, dice in of_organs.items() if dice == 0]
        found = (
            f"; {len(missed)} of {counted(len(of_organs), 'organ')} not found: {', '.join(missed)}" if missed else ""
        )
        logger.info("validation  %s %.4f%s", self.metric, metrics[self.metric], found)
