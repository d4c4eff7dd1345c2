# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Log of a training run: progress lines, a table with one row per line, and a figure of the loss curves at the end."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, EventEnum, Events
from matplotlib.figure import Figure

from ..files import atomic_path, save_figure
from ..run.distributed import rank, sum_over_ranks, world_size
from .steps import ends_step, steps_done

logger = logging.getLogger(__name__)

LONG = 24 * 3600  # seconds; a longer run on a CPU likely uses a GPU's recipe


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Read the rows of a ``training_log.csv``: values as float, the step as int. An incomplete last line is skipped."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [{k: float(v) for k, v in row.items()} for row in rows if all(row.values()) and None not in row]
    return [{**row, "step": int(row["step"])} for row in rows]


def loss_figure(rows: list[dict[str, float]], title: str) -> Figure:
    """Plot each loss over the steps, one panel per loss, the sum first."""
    names = [name for name in rows[0] if name == "loss" or name.startswith("loss_")]
    figure = Figure(figsize=(3.6 * len(names), 2.8), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], color="tab:blue")
        axes.set(title=name.removeprefix("loss_").replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class LogEvents(EventEnum):
    """Events of a training log."""

    ROW = "training_log_row"
    """A row was written; it is in ``engine.state.log_row``."""


class TrainingLog:
    """Handler for `SupervisedTrainer`: logs mean losses, learning rate, crops per second and time left every few steps.

    The first step also has a line, which is not in the table: it shows early how long the run will take. On a CPU, more
    than a day is a WARNING.

    Losses stay on the device between two lines, so that logging does not wait for the GPU at every step. The parts of
    the loss are read from ``loss_function.parts`` (name to tensor) if the loss has them. Means are over all processes;
    non-finite losses are excluded from them.

    Args:
        output_dir: gets ``training_log.csv`` and ``loss_curves.png``. Columns: step, loss, loss_<part> ...,
            gradient_norm, learning_rate, crops_per_second (all processes) and, on a GPU, gpu_memory_gib (peak memory of
            PyTorch's tensors so far).
        total_steps: steps of the whole run.
        every: steps between two lines.
    """

    def __init__(self, *, output_dir: str, total_steps: int, every: int = 10) -> None:
        self.folder = Path(output_dir)
        self.total_steps = total_steps
        self.every = max(1, every)
        self.sums: dict[str, torch.Tensor] = {}
        self.crops = 0
        self.since = 0.0

    @property
    def path(self) -> Path:
        """Path of the table."""
        return self.folder / "training_log.csv"

    def attach(self, engine: Engine) -> None:
        """Register the handlers. All ranks add up their losses; only rank 0 logs."""
        engine.register_events(*LogEvents)
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step_completed)
        if rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Start the clock."""
        self.began = self.since = time.monotonic()
        self.first_step = -1

    def _continue_table(self) -> None:
        """Keep the rows up to the step from which the run resumes, so that no step is in the table twice."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(self.path) if row["step"] <= self.first_step] if self.path.exists() else []
        if kept:
            self._write(kept)
        elif self.path.exists():  # table of another run; the longer one stays, as with the checkpoints
            previous = self.path.with_name(f"previous_{self.path.name}")
            longer = previous.exists() and len(read_log(previous)) > len(read_log(self.path))
            self.path.unlink() if longer else os.replace(self.path, previous)

    def _append(self, row: dict[str, float]) -> None:
        if not self.path.exists():
            self._write([row])
            return
        with open(self.path, newline="") as file:
            columns = next(csv.reader(file))
        if not row.keys() <= set(columns):  # resumed on a GPU, which has one more column
            self._write([*read_log(self.path), row])
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, fieldnames=columns, restval=math.nan, lineterminator="\n").writerow(row)

    def _write(self, rows: Sequence[dict[str, float]]) -> None:
        """Write the whole table; NaN where a row lacks a column."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns, restval=math.nan, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def _add(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().float()
        finite = torch.isfinite(value)
        sums = torch.stack([torch.where(finite, value, 0.0), finite.float()])
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def step_completed(self, engine: Engine) -> None:
        """Accumulate the values; write a line every ``every`` steps."""
        step = steps_done(engine)
        if self.first_step < 0:  # only now, because a resumed checkpoint sets the step after STARTED
            self.first_step = (engine.state.iteration - 1) // engine.accumulation_steps
            if rank() == 0:
                self._continue_table()
        output = engine.state.output
        self._add("loss", output[0]["loss"] if isinstance(output, list) else output["loss"])
        for name, value in getattr(engine.loss_function, "parts", {}).items():
            self._add(f"loss_{name}", value)
        self.crops += engine.state.batch["image"].shape[0] * world_size()
        if not ends_step(engine):
            return
        if hasattr(engine.state, "gradient_norm"):
            self._add("gradient_norm", engine.state.gradient_norm)
        regular = step % self.every == 0 or step == self.total_steps
        if not regular and step != self.first_step + 1:
            return
        now = time.monotonic()
        sums = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()  # one wait for the GPU
        if rank() > 0:
            if regular:
                self.sums = {}
            return
        means = {
            name: total / number if number else math.nan for name, (total, number) in zip(self.sums, sums, strict=True)
        }
        row = {"step": step, **means, "learning_rate": engine.optimizer.param_groups[-1]["lr"]}
        row["crops_per_second"] = round(self.crops / max(now - self.since, 1e-9), 3)
        if torch.cuda.is_available():
            row["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        left = (now - self.began) / (step - self.first_step) * (self.total_steps - step)
        losses = " ".join(f"{k.removeprefix('loss_')} {v:.4f}" for k, v in means.items() if k.startswith("loss"))
        logger.info(
            "step %d/%d  %s  lr %.2e  %.2f crops/s  left %s",
            *(step, self.total_steps, losses, row["learning_rate"], row["crops_per_second"], _clock(left)),
        )
        if step == self.first_step + 1:
            self._warn_if_long(engine, left)
        if not regular:
            return
        self._append(row)
        self.sums, self.crops, self.since = {}, 0, now
        engine.state.log_row = row
        engine.fire_event(LogEvents.ROW)

    def _warn_if_long(self, engine: Engine, left: float) -> None:
        if left > LONG and torch.device(engine.state.device).type == "cpu":
            logger.warning(
                "At the rate of the first step, the run takes about %.0f days on this CPU. --preset cpu is for a CPU; the "
                "other presets are for a GPU.",
                math.ceil(left / LONG),
            )

    def completed(self, engine: Engine) -> None:
        """Save the loss curves."""
        rows = read_log(self.path) if self.path.exists() else []
        if rows:
            figure = loss_figure(rows, f"{len(rows)} means of {self.every} steps")
            save_figure(figure, self.folder / "loss_curves.png")
