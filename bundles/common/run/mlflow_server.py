# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Keep a run alive when its MLflow server is unreachable: warn, go on, and try again later."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from ignite.engine import Engine
from monai.handlers import MLFlowHandler

logger = logging.getLogger(__name__)

#: What MLflow waits for an answer unless the user's environment says otherwise: its own defaults (seven retries of two
#: minutes) would hold up the training for half an hour at each point of a curve.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
FIRST_PAUSE = 60.0  # seconds without a further attempt after a failure; doubled each time


class LastingMLFlowHandler(MLFlowHandler):
    """MONAI's handler whose failures are warnings. After one, it stays silent for a while, longer each time.

    What happens meanwhile is missing in MLflow; ``training_log.csv`` and TensorBoard have it.
    """

    pause = FIRST_PAUSE
    silent_until = 0.0

    def attempt(self, call: Callable[..., Any], *arguments: Any) -> bool:
        """Call something of the server, unless it failed a short time ago.

        Returns:
            Whether it succeeded.
        """
        if time.monotonic() < self.silent_until:
            return False
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        try:
            call(*arguments)
        except Exception as error:  # MLflow, requests and SQLAlchemy raise many kinds
            logger.warning(
                "MLflow at %s failed (%s). The run goes on without it and tries again in %.0f s; curves are in "
                "training_log.csv and TensorBoard, too.",
                *(getattr(self.client, "tracking_uri", "?"), _first_line(error), self.pause),
            )
            self.silent_until, self.pause = time.monotonic() + self.pause, 2 * self.pause
            return False
        self.pause = FIRST_PAUSE
        return True

    def _attempt_in_run(self, engine: Engine, call: Callable[..., Any]) -> None:
        if self.cur_run is not None or self.attempt(super().start, engine):
            self.attempt(call, engine)

    def start(self, engine: Engine) -> None:
        """See `MLFlowHandler`."""
        self.attempt(super().start, engine)

    def iteration_completed(self, engine: Engine) -> None:
        """See `MLFlowHandler`."""
        self._attempt_in_run(engine, super().iteration_completed)

    def epoch_completed(self, engine: Engine) -> None:
        """See `MLFlowHandler`."""
        self._attempt_in_run(engine, super().epoch_completed)

    def complete(self) -> None:
        """See `MLFlowHandler`."""
        self.attempt(super().complete)

    def close(self) -> None:
        """See `MLFlowHandler`."""
        self.attempt(super().close)


def tolerate_lost_servers(handlers: Iterable[Any] | None) -> list[Any]:
    """Make each of MONAI's MLflow handlers among handlers a `LastingMLFlowHandler`.

    ``--tracking mlflow`` lets MONAI add its own handler to the config, so that no other class can be named there.

    Args:
        handlers: handlers of an engine, not attached yet.
    """
    handlers = list(handlers or [])
    for handler in handlers:
        if type(handler) is MLFlowHandler:
            handler.__class__ = LastingMLFlowHandler
    return handlers


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
