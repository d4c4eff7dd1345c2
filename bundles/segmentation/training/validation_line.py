# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Log one line per validation."""

from __future__ import annotations

import logging

from ignite.engine import Engine, Events

from ...common.run.distributed import rank

logger = logging.getLogger(__name__)


class ValidationLine:
    """Handler for `SupervisedEvaluator`: logs a metric at the end of each validation, on rank 0.

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
        logger.info("validation  %s %.4f", self.metric, engine.state.metrics[self.metric])
