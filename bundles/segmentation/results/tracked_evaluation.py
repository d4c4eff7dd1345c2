# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Make an evaluation with ``--tracking mlflow`` a run that says what was scored, with its table and pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ...common.run.distributed import rank
from ...common.run.mlflow_server import mlflow_handler, name_run

logger = logging.getLogger(__name__)

MOST_PICTURES = 50  # pictures of an evaluation; the folder has all


class TrackedEvaluation:
    """Handler of an evaluator; add it last. Without ``--tracking mlflow`` it does nothing. Only rank 0 writes.

    MONAI's own handler writes the scores: ``mean_dice``, ``dice_<organ>`` and the other means.

    Args:
        output_dir: folder of the evaluation; the run is named after it and the folder above.
        parameters: what was scored and how: MLflow's parameters.
        files: names of files in ``output_dir`` to save, or patterns such as ``*_overlay.png``.
    """

    def __init__(
        self,
        *,
        output_dir: str,
        parameters: Mapping[str, Any],
        files: Sequence[str] = ("scores.csv", "summary.json", "scores.png", "*_overlay.png"),
    ) -> None:
        self.folder = Path(output_dir)
        self.parameters = dict(parameters)
        self.files = list(files)

    def attach(self, engine: Engine) -> None:
        """Register the handler."""
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self.started)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Engine) -> None:
        """Name the run, before MONAI's handler starts it."""
        folder = self.folder.resolve()
        name_run(folder, mlflow_handler(engine), name=f"{folder.parent.name}_{folder.name}")

    def epoch_completed(self, engine: Engine) -> None:
        """Save parameters, tables and pictures, and log where they are seen."""
        handler = mlflow_handler(engine)
        if handler is None or not handler.started(engine):
            return
        handler.log_parameters(self.parameters)
        run_id = handler.cur_run.info.run_id
        for pattern in self.files:
            # Pictures lie in folders of their scans; tables of other evaluations may lie below.
            found = self.folder.rglob(pattern) if pattern.startswith("*") else self.folder.glob(pattern)
            for path in sorted(found)[:MOST_PICTURES]:
                handler.attempt(handler.client.log_artifact, run_id, str(path), _place(path, self.folder))
        logger.info("scores, options and pictures of this evaluation: %s", handler.address())


def _place(path: Path, folder: Path) -> str | None:
    """Return the folder of an artifact: ``pictures`` for pictures; None for the top."""
    parts = path.relative_to(folder).parts[:-1]
    return "/".join(("pictures", *parts)) if path.name.endswith("_overlay.png") else "/".join(parts) or None
