# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a person does after a training: continue if the validation still rises, look at the curves, use the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ..run.command_line import next_command, typed_option
from ..run.distributed import rank
from ..run.mlflow_server import mlflow_handler
from ..words import counted
from .steps import steps_done

logger = logging.getLogger(__name__)

FEWEST = 4  # with fewer validations, nothing is said about their course
LATE = 0.25  # share of the validations that count as the end of the run
GAIN = 0.01  # share of the best score; a smaller gain is noise


def still_improves(scores: Sequence[Sequence[float]], *, higher_is_better: bool) -> tuple[Sequence[float], ...] | None:
    """Judge whether a longer run would likely have a better score: the end of this one has, by more than noise.

    Args:
        scores: step and score of each validation, in order.
        higher_is_better: whether a higher score is better.

    Returns:
        Step and score of the best validation before the end of the run, and of the best one at its end, if the latter is
        better by `GAIN` of its value; else None. The end is the last `LATE` of the validations, at least one.
    """
    if len(scores) < FEWEST:
        return None
    first = len(scores) - max(1, round(LATE * len(scores)))
    sign = 1 if higher_is_better else -1
    before, late = (max(part, key=lambda point: sign * point[1]) for part in (scores[:first], scores[first:]))
    return (before, late) if sign * (late[1] - before[1]) > GAIN * abs(late[1]) else None


def scans_to_segment(*, dataset_dir: str) -> str:
    """Return the folder of a data set's unlabelled scans, ``imagesTs``; without one, a word that stands for a scan."""
    folder = Path(dataset_dir) / "imagesTs"
    return str(folder) if folder.is_dir() and any(folder.iterdir()) else "SCAN.nii.gz"


class NextSteps:
    """Handler for `SupervisedTrainer`; add it after `TrainingCheckpoint`. At the end of a run, rank 0 logs

    - whether the score still improves, and the options that continue the run;
    - the address of the run in MLflow, if it is tracked;
    - the next commands, to copy, if this process is a ``monai.bundle run``.

    Args:
        score: name of the score in ``engine.state.validations``.
        higher_is_better: whether a higher score is better.
        commands: purpose to ``config`` (a file in ``configs/``) and ``options`` (name to value; None is left out).
            Optional are ``bundle`` (the folder name of another bundle; else this one), ``useful`` (False: not logged)
            and ``needs`` (a file: logged only if it exists).
        tracked: purposes whose run goes into the MLflow store of this one.
    """

    def __init__(
        self,
        *,
        score: str,
        commands: Mapping[str, Mapping[str, Any]],
        higher_is_better: bool = True,
        tracked: Sequence[str] = (),
    ) -> None:
        self.score = score
        self.higher_is_better = higher_is_better
        self.commands = dict(commands)
        self.tracked = list(tracked)

    def attach(self, engine: Engine) -> None:
        """Register the handler; only rank 0 logs."""
        if rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        scores = getattr(engine.state, "validations", ())
        found = still_improves(scores, higher_is_better=self.higher_is_better)
        if found is not None:
            (step_before, before), (step, best) = found
            logger.info(
                "%s still improves: %.4f at step %d, %.4f at step %d of %d. To go on, repeat the command of this run with "
                "--max_steps %d --resume true --resume_changes \"['max_steps']\"",
                *(self.score, before, step_before, best, step, steps_done(engine), 2 * steps_done(engine)),
            )
        elif len(scores) >= FEWEST:
            sign = 1 if self.higher_is_better else -1
            step, best = max(scores, key=lambda point: sign * point[1])
            logger.info(
                "%s hardly improves any more: best %.4f at step %d in %s",
                *(self.score, best, step, counted(len(scores), "validation")),
            )
        handler = mlflow_handler(engine)
        shared: dict[str, Any] = {}
        if handler is not None:
            logger.info("curves, options and pictures of this run: %s", handler.address())
            shared = {name: typed_option(name) for name in ("tracking", "experiment_name")}
            shared["tracking_uri"] = handler.client.tracking_uri
        for purpose, command in self.commands.items():
            if not command.get("useful", True) or not Path(command.get("needs", ".")).exists():
                continue
            options = dict(command["options"]) | (shared if purpose in self.tracked else {})
            line = next_command(command["config"], options, bundle=command.get("bundle"))
            if line is not None:
                logger.info("next, %s:\n  %s", purpose, line)
