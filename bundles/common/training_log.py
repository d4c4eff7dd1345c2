# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Where a training run stands: a line on the screen, a row in a table, and a picture of the curves at the end."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure

from .checkpoint_file import atomic_path
from .distributed import rank

logger = logging.getLogger(__name__)


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Rows of a ``training_log.csv``, numbers as float; a last line cut off by a kill is left out."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items()} for row in rows if all(row.values()) and None not in row]


def loss_figure(rows: list[dict[str, float]], title: str) -> Figure:
    """One panel per loss (the sum first), over steps."""
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


class TrainingLog:
    """Handler for `SupervisedTrainer`: every few steps the mean losses, learning rate, crops per second and the time left.

    Losses stay on the device between two lines, so that logging does not make the GPU wait at every step. The parts of the
    loss are read from ``loss_function.parts`` (name to tensor) where the loss has them.

    Args:
        output_dir: gets ``training_log.csv`` (step, loss, loss_<part> ..., learning_rate, crops_per_second) and ``loss_curves.png``.
        total_steps: steps of the whole run.
        every: steps between two lines.
    """

    def __init__(self, *, output_dir: str, total_steps: int, every: int = 10) -> None:
        self.folder = Path(output_dir)
        self.total_steps = total_steps
        self.every = max(1, every)
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = self.crops = 0
        self.since = 0.0

    @property
    def path(self) -> Path:
        """The table."""
        return self.folder / "training_log.csv"

    def attach(self, engine: Engine) -> None:
        """Log on rank 0 only."""
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self.started)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.step_completed)
            engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Start the clock."""
        self.began = self.since = time.monotonic()
        self.first_step = -1

    def _continue_table(self) -> None:
        """Keep the rows up to the step that the run resumes from, so that a step stands in the table once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(self.path) if row["step"] <= self.first_step] if self.path.exists() else []
        if kept:
            with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(kept[0]))
                writer.writeheader()
                writer.writerows(kept)
        else:
            self.path.unlink(missing_ok=True)

    def _append(self, row: dict[str, float]) -> None:
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def step_completed(self, engine: Engine) -> None:
        """Add up; write a line when it is due."""
        if self.first_step < 0:  # only now is it sure that a checkpoint to resume from has set the step
            self.first_step = engine.state.iteration - 1
            self._continue_table()
        parts = getattr(engine.loss_function, "parts", {})
        output = engine.state.output
        values = {"loss": output[0]["loss"] if isinstance(output, list) else output["loss"]} | {
            f"loss_{name}": value for name, value in parts.items()
        }
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.steps += 1
        self.crops += engine.state.batch["image"].shape[0]
        step = engine.state.iteration
        if self.steps < self.every and step != self.total_steps:
            return
        now = time.monotonic()
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        speed = self.crops / max(now - self.since, 1e-9)
        learning_rate = engine.optimizer.param_groups[-1]["lr"]
        left = (now - self.began) / (step - self.first_step) * (self.total_steps - step)
        losses = " ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in means.items())
        logger.info(
            "step %d/%d  %s  lr %.2e  %.2f crops/s  left %s",
            *(step, self.total_steps, losses, learning_rate, speed, _clock(left)),
        )
        self._append({"step": step, **means, "learning_rate": learning_rate, "crops_per_second": round(speed, 3)})
        self.sums, self.steps, self.crops, self.since = {}, 0, 0, now

    def completed(self, engine: Engine) -> None:
        """Draw the curves."""
        rows = read_log(self.path) if self.path.exists() else []
        if rows:
            with atomic_path(self.folder / "loss_curves.png") as temporary:
                loss_figure(rows, f"{len(rows)} means of {self.every} steps").savefig(temporary, dpi=100)
