# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Keep a run alive when its MLflow server is unreachable: warn, continue, and try again later."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from monai.handlers import MLFlowHandler

from ..extras import cure
from ..files import write_text
from ..words import shown

logger = logging.getLogger(__name__)

#: How long MLflow waits for an answer unless the user's environment says otherwise: its own defaults (seven retries of
#: two minutes) would hold up the training for half an hour at each point of a curve.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
FIRST_PAUSE = 60.0  # seconds without a further attempt after a failure; doubled each time
LONGEST = 6000  # characters of a parameter that MLflow takes


class LastingMLFlowHandler(MLFlowHandler):
    """MONAI's handler whose failures are warnings. After one, it stays silent for a while, longer each time.

    What happens meanwhile is missing in MLflow; ``training_log.csv`` and TensorBoard have it.

    Attributes:
        own_curves: whether MONAI's handler writes its own curves: loss and learning rates per iteration, and metrics
            per epoch. False where the run writes them over steps, so that no metric appears twice.
    """

    own_curves = True
    pause = FIRST_PAUSE
    silent_until = 0.0

    def attempt(self, call: Callable[..., Any], *arguments: Any) -> bool:
        """Call a function of the server, unless one failed a short time ago.

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
        if self.own_curves:
            self._attempt_in_run(engine, super().iteration_completed)

    def epoch_completed(self, engine: Engine) -> None:
        """See `MLFlowHandler`."""
        if self.own_curves:
            self._attempt_in_run(engine, super().epoch_completed)

    def complete(self) -> None:
        """See `MLFlowHandler`."""
        self.attempt(super().complete)

    def close(self) -> None:
        """See `MLFlowHandler`."""
        self.attempt(super().close)

    def started(self, engine: Engine) -> bool:
        """Start the run if needed; return whether it has started: MONAI starts it with the engine, after others."""
        if self.cur_run is None:
            self.start(engine)
        return self.cur_run is not None

    def log_parameters(self, values: Mapping[str, Any]) -> bool:
        """Write the parameters that the run does not have yet: MLflow takes each once, and a resumed run has them.

        Returns:
            Whether it succeeded.
        """
        return self.attempt(self._log_parameters, values)

    def _log_parameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param  # takes a second, which only a tracked run needs

        run_id = self.cur_run.info.run_id
        there = self.client.get_run(run_id).data.params
        new = [Param(name, shown(value)[:LONGEST]) for name, value in values.items() if name not in there]
        self.client.log_batch(run_id, params=new)

    def address(self) -> str:
        """Return where a person sees the run: the page of a server, or the command that shows a database."""
        uri = self.client.tracking_uri
        if not uri.startswith(("http://", "https://")):
            page = "" if find_spec("flask") else f" (the page is not installed: {cure('mlflow', 'mlflow')})"
            return f"mlflow ui --backend-store-uri {shlex.quote(uri)}, then http://127.0.0.1:5000{page}"
        if self.cur_run is None:
            return uri
        return f"{uri.rstrip('/')}/#/experiments/{self.cur_run.info.experiment_id}/runs/{self.cur_run.info.run_id}"


def name_run(
    folder: str | os.PathLike, *handlers: LastingMLFlowHandler | None, resume: bool = False, name: str | None = None
) -> None:
    """Name the MLflow run, unless it has a name, before MONAI's handler starts.

    Without a name, MONAI's handler would continue the last unfinished run, of any user.

    Args:
        folder: output folder, where the name is noted.
        handlers: handlers of the run; the first decides whether there is a name. None: not tracked.
        resume: take the noted name.
        name: beginning of the name; None: that of the folder.
    """
    if not handlers or handlers[0] is None or handlers[0].run_name is not None:
        return
    note = Path(folder) / ".mlflow_run_name"
    if not (resume and note.exists()):
        name = name or Path(folder).resolve().name
        write_text(note, f"{name}_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:6]}")
    for handler in handlers:
        if handler is not None:
            handler.run_name = note.read_text()


def bundle_version(bundle_root: str | os.PathLike) -> str:
    """Return the version in a bundle's ``metadata.json``, which MONAI Label does not pass to its configs."""
    return json.loads((Path(bundle_root) / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]


def mlflow_handler(engine: Engine) -> LastingMLFlowHandler | None:
    """Return the handler that ``--tracking mlflow`` has attached to the engine, or None.

    It is found through a private attribute: ignite has no public list of an engine's handlers, and MONAI does not
    expose this handler.
    """
    attached = [handler for handlers in engine._event_handlers.values() for handler, *_ in handlers]
    owners = [getattr(handler, "__self__", None) for handler in attached]
    return next((owner for owner in owners if isinstance(owner, LastingMLFlowHandler)), None)


def tolerate_lost_servers(handlers: Iterable[Any] | None) -> list[Any]:
    """Turn each of MONAI's MLflow handlers in a list into a `LastingMLFlowHandler`.

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
