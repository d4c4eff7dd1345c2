# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Probe the network at every validation of the pre-training: metrics, a table, a picture and a line of the log."""

from __future__ import annotations

import csv
import json
import logging
import time
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from ...common.files import atomic_path, move_file, save_figure
from ...common.run.distributed import rank
from ...common.training.log import read_log
from ...common.training.steps import steps_done
from .curve import MEAN, curve_figure
from .features import frozen_features, intensities
from .probe import Probe

TABLE, CURVE = "probe.csv", "probe_curve.png"

logger = logging.getLogger(__name__)


class ProbeReport:
    """Handler for `SupervisedTrainer`. Add it after the validation handler, before `Tracking` and `TrainingCheckpoint`.

    At the start it probes the intensities alone, and the network with the weights that the training starts from: the
    curve has these two levels to be compared with. (Before `TrainingCheckpoint`, so that this holds for a resumed run,
    too.) After every validation its figures are among the metrics of the validation, on all ranks.

    It belongs to the trainer, not to the evaluator, because it needs the number of the step, and because another probe
    does not change what the losses of the validation measure.

    Args:
        probe: what is measured.
        network: its ``features`` are read.
        evaluator: validation engine; it gets the metrics, and lends its precision.
        output_dir: gets ``probe.csv`` (``step``, 0 before training; ``probe_dice``, the mean; ``probe_dice_CLASS``;
            ``intensity_alone``, the mean without a network; ``seconds``; ``probe``, a checksum of ``identity``) and
            ``probe_curve.png``.
        identity: everything that decides what is measured, besides the network; plain values. Rows of this probe up to
            the step from which a run resumes are kept, all others are dropped (a new run starts at step 0: all).
    """

    def __init__(
        self,
        *,
        probe: Probe,
        network: torch.nn.Module,
        evaluator: Engine,
        output_dir: str,
        identity: Any,
    ) -> None:
        self.probe = probe
        self.network = network
        self.evaluator = evaluator
        self.folder = Path(output_dir)
        self.identity = zlib.crc32(json.dumps(identity, sort_keys=True).encode())
        self.rows: list[dict[str, float]] = []
        self.others = False  # whether the table has rows of another probe
        self.started_table = False

    def attach(self, engine: Engine) -> None:
        """Register the handlers: all ranks measure, rank 0 reports."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Engine) -> None:
        """Measure what the curve is compared with; read the rows of a run that is resumed."""
        began = time.monotonic()
        self.alone = self.probe.measure(intensities)
        self.before = self._measure()
        seconds = time.monotonic() - began
        self.rows, self.others = [], False
        if (self.folder / TABLE).exists():
            rows = read_log(self.folder / TABLE)
            self.rows = [{**row, "probe": self.identity} for row in rows if row.get("probe") == self.identity]
            self.others = len(self.rows) < len(rows)
        self.rows = [self._row(0, self.before, seconds), *(row for row in self.rows if row["step"] > 0)]
        if rank() == 0:
            logger.info(
                "probe before training: Dice %.3f; intensity alone %.3f; %.1f s",
                *(self.before[MEAN], self.alone[MEAN], seconds),
            )

    def epoch_started(self, engine: Engine) -> None:
        """Start the table, without rows of steps that were lost when the run was killed.

        Only now: at the start of the engine `TrainingCheckpoint` may still refuse to resume, and then nothing changes.
        """
        kept = [row for row in self.rows if row["step"] <= steps_done(engine)]
        if rank() == 0 and (len(kept) < len(self.rows) or not self.started_table):
            if not self.started_table and (steps_done(engine) == 0 or self.others):
                for name in TABLE, CURVE:  # of another run, or of other scans
                    move_file(self.folder / name, self.folder / f"previous_{name}")
            self.rows = kept
            self._write()
        self.rows, self.started_table = kept, True

    def epoch_completed(self, engine: Engine) -> None:
        """Probe after a validation that was not interrupted."""
        if engine.should_terminate:
            return
        began = time.monotonic()
        measured = self._measure()
        seconds = time.monotonic() - began
        self.evaluator.state.metrics.update(measured)
        step = steps_done(engine)
        self.rows = [row for row in self.rows if row["step"] < step] + [self._row(step, measured, seconds)]
        if rank() == 0:
            logger.info(
                "probe at step %d: Dice %.3f; before training %.3f, intensity alone %.3f; %.1f s",
                *(step, measured[MEAN], self.before[MEAN], self.alone[MEAN], seconds),
            )
            self._write()

    def _measure(self) -> dict[str, float]:
        amp = {"amp": self.evaluator.amp, "amp_kwargs": self.evaluator.amp_kwargs}
        return self.probe.measure(partial(frozen_features, self.network, **amp))

    def _row(self, step: int, measured: Mapping[str, float], seconds: float) -> dict[str, float]:
        more = {"intensity_alone": self.alone[MEAN], "seconds": round(seconds, 2), "probe": self.identity}
        return {"step": step, **measured, **more}

    def _write(self) -> None:
        with atomic_path(self.folder / TABLE) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        save_figure(curve_figure(self.rows), self.folder / CURVE)
