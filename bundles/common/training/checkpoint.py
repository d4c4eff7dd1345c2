# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Checkpoints of a training run: the last state to resume from, the best weights so far, and the result at the end."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite
import monai
import numpy as np
import torch
from ignite.engine import Engine, Events

from ..data.seeded_crops import DrawSampler
from ..errors import InputError
from ..run.distributed import gather_lists, rank, unwrap, world_size
from ..run.options import RunSettings, plain_lists
from ..weights.checkpoint_file import load_checkpoint_file, save_atomically
from ..weights.loading import encoder_state
from .steps import steps_done
from .weight_average import WeightAverage

logger = logging.getLogger(__name__)


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, in types that ``weights_only=True`` opens."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of this process's GPU
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


#: Settings that decide which tensors the network has: no checkpoint fits after a change.
DECIDES_THE_NETWORK = {"tasks", "heads", "labels", "task", "freeze_encoder"}

#: Parts of a schedule's state that come from options, not from the progress of the run.
SCHEDULE_OPTIONS = ("base_lrs", "t_total", "warmup_steps", "floor")


class TrainingCheckpoint:
    """Handler for `SupervisedTrainer`; put it behind the validation handler, so that it sees this epoch's score.

    Files under ``folder``: ``last.pt`` after every epoch and when the engine is terminated (everything that a resumed run needs to be the same
    run), ``best.pt`` (weights of the best validation so far), and when the run is complete ``model.pt`` with the best weights; a file of that
    name is never a half-trained one. With ``encoder_file``, ``encoder.pt`` too.

    Args:
        folder: where the files go.
        network, optimizer, lr_scheduler: objects whose state is kept.
        sampler: told the iteration to go on from.
        encoder: encoder record (`swin_encoder.FIELDS`).
        details: more entries of ``model.pt`` beside the weights, such as ``out_channels`` and ``labels``.
        trained: what to say of the training, such as data and preset.
        settings: what identifies the run: saved beside ``trained``, and equal in a resumed run. If one of those that decide
            the scores is changed on resume, the best score so far is forgotten.
        score: name of the validation metric that chooses the best, read from ``evaluator.state.metrics``.
        evaluator: the validation engine, or None when the run has none: the last weights are then the result.
        higher_is_better: direction of the score.
        resume: continue from ``last.pt`` if it is there.
        resume_changes: names of settings that may differ from those of the run that is resumed.
        encoder_file: also write ``encoder.pt``.
        early_stopping: validations in a row without a better score after which the run is complete; None, or no evaluator, never ends it early.
        average: mean of the weights that is validated; ``best.pt`` and ``model.pt`` then have it in place of the network's own.

    Raises:
        InputError: ``resume_changes`` names no setting; ``early_stopping`` is no number of validations.
    """

    def __init__(
        self,
        *,
        folder: str,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        sampler: DrawSampler,
        encoder: Mapping[str, Any],
        details: Mapping[str, Any],
        trained: Mapping[str, Any],
        settings: RunSettings,
        score: str,
        evaluator: Engine | Callable | None = None,
        higher_is_better: bool = True,
        resume: bool = False,
        resume_changes: Sequence[str] = (),
        encoder_file: bool = False,
        early_stopping: int | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.stateful = {"network": unwrap(network), "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.network = unwrap(network)
        self.average = average
        if average is not None and average.model is not None:
            self.stateful["average"] = average.model
        self.sampler = sampler
        self.encoder = dict(encoder)
        self.details = dict(details)
        self.trained = dict(trained)
        self.settings = plain_lists({**settings.values, "processes": world_size()})
        self.of_the_scores = settings.of_the_scores
        self.score = score
        self.evaluator = evaluator
        self.sign = 1 if higher_is_better else -1
        self.resume = resume
        self.resume_changes = [resume_changes] if isinstance(resume_changes, str) else list(resume_changes)
        if unknown := sorted(set(self.resume_changes) - set(self.settings)):
            raise InputError(
                f"--resume_changes names {', '.join(unknown)}; the settings of a run are {', '.join(sorted(self.settings))}."
            )
        self.encoder_file = encoder_file
        if early_stopping is not None:
            if isinstance(early_stopping, bool) or not isinstance(early_stopping, int) or early_stopping < 1:
                raise InputError(
                    f"--early_stopping {early_stopping!r} must be a number of validations above 0, or '$None' never to stop early."
                )
            if evaluator is None:
                logger.info("no validation, so no early stopping: the run makes all its steps")
                early_stopping = None
        self.early_stopping = early_stopping
        self.best: float | None = None
        self.best_epoch = 0
        self.random: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """All ranks resume, rank 0 alone writes."""
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.continue_from_last)
            engine.add_event_handler(Events.GET_BATCH_STARTED, self.continue_random)
        if rank() == 0 and not self.resume:
            engine.add_event_handler(Events.STARTED, self.set_aside)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.TERMINATE, self.terminated)
        if rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self.completed)

    def set_aside(self, engine: Engine) -> None:
        """Rename what an earlier run left in this folder, lest it pass for this run's: ``previous_last.pt`` and so on."""
        self._set_aside("last.pt", "best.pt", "model.pt", "encoder.pt")

    def _set_aside(self, *names: str) -> None:
        for name in names:
            if (self.folder / name).exists():
                os.replace(self.folder / name, self.folder / f"previous_{name}")

    def _check_settings(self, state: Mapping[str, Any], path: Path) -> list[str]:
        """Names of the settings that differ, all of them allowed to."""
        theirs, ours = state["settings"], self.settings
        if state["encoder"] != self.encoder:
            raise InputError(
                f"{path} belongs to another run: its encoder is {state['encoder']}, this run's is {self.encoder}. "
                "Start it with the options of that run, or choose another --output_dir."
            )
        # a setting that an older version did not record cannot be compared
        changed = [name for name in sorted(theirs) if theirs[name] != ours.get(name)]
        if fixed := [name for name in changed if name in DECIDES_THE_NETWORK]:
            said = "; ".join(f"{name} was {theirs.get(name)!r}, now {ours.get(name)!r}" for name in fixed)
            raise InputError(
                f"{path} belongs to another network: {said}. Start a new run in another --output_dir; --pretrained_model goes on from a model.pt."
            )
        refused = [name for name in changed if name not in self.resume_changes]
        if refused:
            said = "; ".join(f"{name} was {theirs.get(name)!r}, now {ours.get(name)!r}" for name in refused)
            raise InputError(
                f"{path} belongs to a run with other settings: {said}. Start it with the settings of that run, choose another --output_dir, "
                f'or allow the change by --resume_changes "{refused}".'
            )
        for name in changed:
            logger.warning("--resume_changes: %s was %r, now %r", name, theirs.get(name), ours.get(name))
        return changed

    def continue_from_last(self, engine: Engine) -> None:
        """Load ``last.pt`` and set the engine and the sampler to the step after it; make up for a validation that a stop cut short."""
        path = self.folder / "last.pt"
        state = load_checkpoint_file(str(path)) if path.exists() else None
        seen = gather_lists([state.get("step") if isinstance(state, Mapping) else None])
        if len(set(seen)) > 1:
            raise InputError(
                f"the processes do not see the same {path}: its step is {seen} there (None: not there). All nodes must share --output_dir."
            )
        if state is None:
            logger.info("--resume true: %s is not there, the run starts at step 0", path)
            return
        if not isinstance(state, Mapping) or not {"settings", "step", "network"} <= set(state):
            raise InputError(f"{path} is not a last.pt that this version wrote: it cannot be resumed from.")
        changed = self._check_settings(state, path)
        options = [dict(group) for group in self.optimizer.param_groups]
        schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k in SCHEDULE_OPTIONS}
        # how the optimiser computes is this machine's choice
        for saved, group in zip(state["optimizer"]["param_groups"], options, strict=False):
            saved.update({name: group[name] for name in ("foreach", "fused") if name in group})
        for name, target in self.stateful.items():
            if name == "average" and name not in state:  # --resume_changes average_steps
                self.average.start_anew()
            else:
                target.load_state_dict(state[name])
        if changed:  # options are this run's; how far it has come is the checkpoint's
            for group, option in zip(self.optimizer.param_groups, options, strict=True):
                group.update({name: value for name, value in option.items() if name not in ("params", "lr")})
            self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **schedule})
            self.lr_scheduler.last_epoch -= 1
            self.lr_scheduler.step()  # takes the learning rate of this step from the new schedule
        if engine.scaler is not None and state["scaler"]:
            engine.scaler.load_state_dict(state["scaler"])
        for name, value in state["counts"].items():
            setattr(engine.state, name, value)
        engine.state.skipped_in_a_row = 0  # whoever resumes has changed something, or hopes
        engine.state.iteration = state["step"] * engine.accumulation_steps
        engine.state.epoch = engine.state.iteration // engine.state.epoch_length
        self.sampler.first = engine.state.iteration
        comparable = not self.of_the_scores.intersection(changed)
        self.best = state["best"] if comparable else None
        if not comparable:
            logger.warning(
                "The best %s so far (%s) is forgotten: it was measured with other settings.", self.score, state["best"]
            )
        self.best_epoch = state["best_epoch"] if not changed else engine.state.epoch
        self._end_if_stale(engine)
        if rank() == 0 and engine.state.epoch < engine.state.max_epochs:
            self._set_aside("model.pt", "encoder.pt")  # results of the same run when it was to be shorter
        logger.info("%s: the run goes on after step %d", path, state["step"])
        restore_random_states(state["random"])
        ends_epoch = engine.state.iteration % engine.state.epoch_length == 0
        if ends_epoch and not state["validated"]:
            engine.fire_event(Events.EPOCH_COMPLETED)  # validate, track, save: what the stop cut short
        self.random = random_states()

    def continue_random(self, engine: Engine) -> None:
        """Restore the generators at the first batch: the data loader, built anew in between, takes a number that the unbroken run did not."""
        if self.random is not None:
            restore_random_states(self.random)
            self.random = None

    def _result(self, engine: Engine, score: float | None) -> dict[str, Any]:
        trained = {
            **self.settings,
            **self.trained,
            "steps": steps_done(engine),
            **{name: getattr(engine.state, name) for name in engine.state_dict_user_keys},
            "score": {self.score: score},
            "versions": {"monai": monai.__version__, "torch": str(torch.__version__), "ignite": ignite.__version__},
        }
        network = self.network if self.average is None else self.average.network
        model = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        return {"model": model, "encoder": self.encoder, **self.details, "trained": trained}

    def epoch_completed(self, engine: Engine) -> None:
        """Write ``last.pt``, and ``best.pt`` if this epoch's validation is better than all before."""
        if engine.should_terminate:  # a stop cut the validation short
            return
        score = None if self.evaluator is None else float(self.evaluator.state.metrics[self.score])
        # without a validation every epoch is the best so far; a score that is not a number is never one
        if score is None or (score == score and (self.best is None or self.sign * score > self.sign * self.best)):
            self.best, self.best_epoch = score, engine.state.epoch
            if rank() == 0:
                save_atomically(self._result(engine, score), self.folder / "best.pt")
        if score is None or score == score:  # else keep the last sound state
            self._save_last(engine, validated=True)
        self._end_if_stale(engine)

    def _end_if_stale(self, engine: Engine) -> None:
        """Make this epoch the last one: ignite's own handler terminates the engine, which here means that a run was cut off."""
        since = engine.state.epoch - self.best_epoch
        if self.early_stopping is None or since < self.early_stopping or engine.state.epoch >= engine.state.max_epochs:
            return
        if rank() == 0:
            logger.info("no better %s in %d validations: the run ends here (--early_stopping)", self.score, since)
        engine.state.max_epochs = engine.state.epoch

    def terminated(self, engine: Engine) -> None:
        """Write ``last.pt`` in the middle of an epoch."""
        self._save_last(engine, validated=False)

    def _save_last(self, engine: Engine, *, validated: bool) -> None:
        if rank() != 0 or getattr(
            engine.state, "skipped_in_a_row", 0
        ):  # steps left out at its end: the last sound state stays
            return
        state = {name: target.state_dict() for name, target in self.stateful.items()}
        state |= {
            "scaler": None if engine.scaler is None else engine.scaler.state_dict(),
            "step": steps_done(engine),
            "counts": {name: getattr(engine.state, name) for name in engine.state_dict_user_keys},
            "validated": validated,
            "random": random_states(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "encoder": self.encoder,
            "settings": self.settings,
        }
        save_atomically(state, self.folder / "last.pt")

    def completed(self, engine: Engine) -> None:
        """Write the result of the run."""
        best = self.folder / "best.pt"
        if not best.exists():
            raise InputError(
                f"no validation of this run gave a finite {self.score}: there are no weights worth keeping."
            )
        result = load_checkpoint_file(str(best))
        if self.encoder_file:
            encoder = {name: tensor for name, tensor in result["model"].items() if name in encoder_state(self.network)}
            save_atomically(
                {"state_dict": encoder, "encoder": self.encoder, "trained": result["trained"]},
                self.folder / "encoder.pt",
            )
        save_atomically(result, self.folder / "model.pt")
        logger.info(
            "wrote %s (step %d, %s)", self.folder / "model.pt", result["trained"]["steps"], result["trained"]["score"]
        )
