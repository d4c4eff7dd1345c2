# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write curves and pictures of a run to TensorBoard, and to MLflow with ``--tracking mlflow``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

from ..files import move_file
from ..run.distributed import rank
from ..run.mlflow_server import LastingMLFlowHandler, bundle_version, mlflow_handler, name_run
from ..run.options import RunSettings
from ..weights.module_table import table_text
from .log import LogEvents
from .steps import steps_done


def run_parameters(
    *,
    settings: RunSettings,
    encoder: Mapping[str, Any],
    network: torch.nn.Module,
    bundle_root: str,
    start: Mapping[str, Any] | None,
    **facts: Any,
) -> dict[str, Any]:
    """Return what identifies a training, for MLflow's parameters: options, network, start weights and versions.

    Args:
        settings: options and facts of the run.
        encoder: encoder record; each of its fields becomes ``encoder_...``.
        network: the network that is trained.
        bundle_root: folder of the bundle, whose ``metadata.json`` has its version.
        start: report of the start weights, or None for training from scratch.
        facts: further parameters, such as ``preset`` and ``data``.
    """
    count = sum(parameter.numel() for parameter in network.parameters())
    return {
        **facts,
        **settings.values,
        **{f"encoder_{field}": value for field, value in encoder.items()},
        "start": "scratch" if start is None else start["file"],
        "network": f"{type(network).__name__}, {count:,} parameters",
        "bundle_version": bundle_version(bundle_root),
        "monai_version": monai.__version__,
        "torch_version": str(torch.__version__),
    }


class Tracking:
    """Handler for `SupervisedTrainer`; add it after `TrainingLog` and the validation handler. Only rank 0 writes.

    Each row of the training log becomes a point of the curves ``train/...``, each validation a point of
    ``validation/...``, both over steps. What `Movement` measures becomes the curves ``weights_moved/...``, which MLflow
    shows after the others. MONAI's MLflow handler would write the same losses, rates and scores again, over iterations
    and epochs: it does not.

    Args:
        output_dir: event files are written to its ``tensorboard/``; pictures are read from it.
        tensorboard: whether to write event files.
        evaluator: validation engine whose metrics are tracked, or None.
        resume: whether the run continues an earlier one, in MLflow too.
        pictures: names of PNG files in ``output_dir`` to save after every validation, if they exist.
        at_the_end: names of further files in ``output_dir`` to save in MLflow when the run is complete, if they exist.
        parameters: what to write as MLflow's parameters: options and facts of the run.
        start: report of the start weights (`load_start_weights`); its table is saved as ``start_weights.txt``.
    """

    def __init__(
        self,
        *,
        output_dir: str,
        tensorboard: bool,
        evaluator: Engine | None = None,
        resume: bool = False,
        pictures: Sequence[str] = (),
        at_the_end: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(output_dir)
        self.tensorboard = tensorboard
        self.evaluator = evaluator
        self.resume = resume
        self.pictures = list(pictures)
        self.at_the_end = list(at_the_end)
        self.parameters = parameters
        self.start = start
        self.writer: SummaryWriter | None = None

    def attach(self, engine: Engine) -> None:
        """Register the handlers: they write after each row of the log and each validation."""
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self.name_run)
            engine.add_event_handler(LogEvents.ROW, self.row_written)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
            engine.add_event_handler(Events.COMPLETED, self.completed)
            for event in (Events.COMPLETED, Events.TERMINATE):
                engine.add_event_handler(event, self.close)

    def name_run(self, engine: Engine) -> None:
        """Name the MLflow run, set the pictures of an earlier run aside, and keep MONAI's handlers from writing curves."""
        if not self.resume:
            for name in self.pictures:  # a task that is off draws none: its old picture would count as this run's
                move_file(self.folder / name, self.folder / f"previous_{name}")
        handlers = (mlflow_handler(engine), self.evaluator and mlflow_handler(self.evaluator))
        name_run(self.folder, *handlers, resume=self.resume)
        for handler in filter(None, handlers):
            handler.own_curves = False

    def _handler(self, engine: Engine) -> LastingMLFlowHandler | None:
        """Return the handler if its run could be started: a validation repeated on resume precedes MONAI's start."""
        handler = mlflow_handler(engine)
        return handler if handler is not None and handler.started(engine) else None

    def _scalars(self, engine: Engine, group: str, values: Mapping[str, float]) -> None:
        step = steps_done(engine)
        values = {f"{group}/{name}": float(value) for name, value in values.items()}
        if self.tensorboard:
            if self.writer is None:  # purge_step: a resumed run replaces later points of the run that was killed
                self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        handler = self._handler(engine)
        if handler is not None:
            # only now: a run without MLflow needs neither the package nor the second that it takes
            from mlflow.entities import Metric

            now = int(1000 * time.time())
            run_id = handler.cur_run.info.run_id
            if self.start is not None:
                if handler.attempt(handler.client.log_text, run_id, self._start_text(), "start_weights.txt"):
                    self.start = None
            if self.parameters is not None and handler.log_parameters(self.parameters):
                self.parameters = None
            metrics = [Metric(name, value, now, step) for name, value in values.items()]
            handler.attempt(handler.client.log_batch, run_id, metrics)

    def _start_text(self) -> str:
        return f"{self.start['file']}\n{table_text(self.start['modules'])}\n"

    def row_written(self, engine: Engine) -> None:
        """Write a point of the training curves."""
        self._scalars(engine, "train", {k: v for k, v in engine.state.log_row.items() if k != "step"})

    def epoch_completed(self, engine: Engine) -> None:
        """Write a point of the validation curves and of the movement, and the pictures."""
        if engine.should_terminate:
            return
        for measure, values in getattr(engine.state, "moved", {}).items():
            self._scalars(engine, "weights_moved", {f"{measure}/{part}": value for part, value in values.items()})
        if self.evaluator is None:
            return
        self._scalars(engine, "validation", self.evaluator.state.metrics)
        step = steps_done(engine)
        handler = self._handler(engine)
        for path in [self.folder / name for name in self.pictures if (self.folder / name).exists()]:
            if self.writer is not None:
                picture = np.ascontiguousarray(matplotlib.image.imread(path)[..., :3])
                self.writer.add_image(path.stem, picture, step, dataformats="HWC")
            if handler is not None:
                run_id = handler.cur_run.info.run_id
                handler.attempt(handler.client.log_artifact, run_id, str(path), f"pictures/step_{step:06d}")

    def completed(self, engine: Engine) -> None:
        """Save the files of the whole run."""
        handler = self._handler(engine)
        for path in [self.folder / name for name in self.at_the_end if (self.folder / name).exists()]:
            if handler is not None:
                handler.attempt(handler.client.log_artifact, handler.cur_run.info.run_id, str(path))

    def close(self, engine: Engine) -> None:
        """Write what is still in memory."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
