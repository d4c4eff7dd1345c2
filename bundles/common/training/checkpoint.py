# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Checkpoints of a training run: the last state to resume from, the best weights so far, and the final result."""

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
from ..files import first_free
from ..run.distributed import gather_lists, rank, unwrap, world_size
from ..run.options import PROCESSES, RunSettings, check_option, check_resume_changes, plain_lists
from ..weights.checkpoint_file import load_checkpoint_file, save_atomically
from ..weights.loading import decoder_state, encoder_state, trains_decoder
from ..weights.merging_guard import trusted_weights
from ..words import counted, listed, sentence, shown
from .steps import steps_done
from .weight_average import WeightAverage

logger = logging.getLogger(__name__)


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, in types that ``weights_only=True`` can load."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # state of this process's GPU
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states that `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


#: Settings that determine the tensors of the network: after a change, no checkpoint fits.
DECIDES_THE_NETWORK = {"tasks", "heads", "labels", "task", "freeze_encoder"}

RESULTS = ("model.pt", "encoder.pt", "network.pt")

#: Entries of ``last.pt`` in addition to the states of network, optimiser and schedule.
STATE = ("scaler", "step", "counts", "validated", "random", "best", "best_epoch", "settings")

#: Parts of a learning rate schedule's state that come from options, not from the progress of the run.
SCHEDULE_OPTIONS = ("base_lrs", "t_total", "warmup_steps", "floor", "new_parts_steps")


def _changes(names: Sequence[str], saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} was {shown(saved.get(name))}, now {shown(current.get(name))}" for name in names)


class TrainingCheckpoint:
    """Handler for `SupervisedTrainer` that saves and resumes. Add it after the validation handler: it reads its score.

    Files under ``folder``:

    - ``last.pt``, after every epoch and when the engine is terminated: everything that is needed to resume exactly;
    - ``best.pt``: weights of the best validation so far; of the last one as long as all scores are equal: such a score
      means nothing, and ends no run early;
    - ``model.pt``, only when the run is complete: the best weights;
    - ``encoder.pt``, with ``encoder_file``, when the run is complete;
    - ``network.pt``, with ``encoder_file``, if the network has the decoder of Swin UNETR: all of it but the last layer,
      and ``kept_heads``.

    Args:
        folder: where the files are written.
        network, optimizer, lr_scheduler: objects whose state is saved.
        sampler: gets the iteration to continue from.
        encoder: encoder record (`encoder_record.FIELDS`).
        details: further entries of ``model.pt``, such as ``out_channels`` and ``labels``.
        trained: information about the training to record, such as data and preset.
        settings: what identifies the run. It is saved with ``trained``, and must be equal in a resumed run. If a
            setting that affects the scores is changed on resume, the best score so far is discarded.
        score: name of the validation metric that selects the best weights, read from ``evaluator.state.metrics``.
        evaluator: the validation engine, or None: the last weights are then the result.
        higher_is_better: whether a higher score is better.
        resume: continue from ``last.pt`` if it exists.
        resume_changes: names of settings that may differ from those of the resumed run.
        encoder_file: also write ``encoder.pt`` and ``network.pt``.
        kept_heads: beginnings of the names of further tensors for ``network.pt``.
        early_stopping: end the run after this many validations in a row without a better score. None, or no evaluator:
            never end early.
        average: average of the weights. It is what is validated, and what ``best.pt`` and ``model.pt`` contain instead
            of the network's own weights.
        keep_results: number the results of earlier runs in the folder; False: only those of the last one are kept.

    Raises:
        InputError: ``resume_changes`` names something that is not a setting, or ``early_stopping`` is not a number of
            validations.
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
        kept_heads: Sequence[str] = (),
        early_stopping: int | None = None,
        average: WeightAverage | None = None,
        keep_results: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.stateful = {"network": unwrap(network), "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.network = unwrap(network)
        self.average = average
        self.keep_results = keep_results
        if average is not None and average.model is not None:
            self.stateful["average"] = average.model
        self.sampler = sampler
        self.encoder = dict(encoder)
        self.details = dict(details)
        self.trained = dict(trained)
        self.settings = plain_lists({**settings.values, PROCESSES: world_size()})
        self.of_the_scores = settings.of_the_scores
        self.score = score
        self.evaluator = evaluator
        self.sign = 1 if higher_is_better else -1
        self.resume = resume
        self.resume_changes = check_resume_changes(resume_changes, self.settings)
        self.encoder_file = encoder_file
        self.kept_heads = tuple(kept_heads)
        if early_stopping is not None:
            check_option("early_stopping", early_stopping)
            if evaluator is None:
                logger.info("no validation, so no early stopping: the run takes all its steps")
                early_stopping = None
        self.early_stopping = early_stopping
        self.best: float | None = None
        self.best_lost = False  # whether best.pt of the resumed run could not be read
        self.best_epoch = 0
        self.moved = False  # whether two validations of this run had different scores
        self.scores: list[list[float]] = []  # step and score of each validation
        self.random: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Register the handlers: all ranks resume, rank 0 writes. ``engine.state.validations``: the scores so far."""
        engine.state.validations = self.scores
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
        """Rename the files of an earlier run in this folder to ``previous_last.pt`` and so on.

        A state already set aside stays if its run got further: whoever forgets ``--resume true`` twice has the first
        run's state as ``previous_last.pt``, not that of a few steps. Results (`RESULTS`) are numbered: none is lost.
        """
        if self._steps_in("previous_last.pt") > self._steps_in("last.pt") >= 0:
            logger.warning(
                "%s is of a longer run than %s, and stays; the state of the shorter run is removed",
                *(self.folder / "previous_last.pt", self.folder / "last.pt"),
            )
            for name in ("last.pt", "best.pt"):
                (self.folder / name).unlink(missing_ok=True)
        self._set_aside("last.pt", "best.pt")
        self._set_aside(*RESULTS, numbered=self.keep_results)

    def _steps_in(self, name: str) -> int:
        """Return the steps of a saved state; -1 if there is none that can be read."""
        try:
            state = load_checkpoint_file(str(self.folder / name))
        except InputError:
            return -1
        return int(state.get("step", -1)) if isinstance(state, Mapping) else -1

    def _set_aside(self, *names: str, numbered: bool = False) -> None:
        """Rename files to ``previous_NAME``; numbered: to ``previous_NAME_2`` and so on, if that is taken."""
        for path in (self.folder / name for name in names):
            if path.exists():
                aside = path.with_name(f"previous_{path.name}")
                aside = first_free(aside) if numbered else aside
                os.replace(path, aside)
                logger.info("the earlier %s is now %s", path, aside.name)

    def _check_settings(self, state: Mapping[str, Any], path: Path) -> list[str]:
        """Return the names of the changed settings; raise `InputError` if one of them must not change."""
        saved, current = state["settings"], self.settings
        if state["encoder"] != self.encoder:
            raise InputError(
                f"{path} belongs to another run: its encoder is {shown(state['encoder'])}; this run's is {shown(self.encoder)}. "
                "Use the options of that run, or another --output_dir."
            )
        # a setting that an older version did not record cannot be compared
        changed = [name for name in sorted(saved) if saved[name] != current.get(name)]
        if fixed := [name for name in changed if name in DECIDES_THE_NETWORK]:
            changes = _changes(fixed, saved, current)
            raise InputError(
                f"{path} belongs to another network: {changes}. Start a new run in another --output_dir; "
                "to continue from the weights of a model.pt, pass it as --pretrained_model."
            )
        refused = [name for name in changed if name not in self.resume_changes]
        if refused:
            changes = _changes(refused, saved, current)
            raise InputError(
                f"{path} belongs to a run with other settings: {changes}. Use the settings of that run, another --output_dir, "
                f'or allow the change with --resume_changes "{sorted({*self.resume_changes, *refused})}".'
            )
        for name in changed:
            logger.warning("--resume_changes: %s", _changes([name], saved, current))
        return changed

    def _check_groups(self, saved: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Raise `InputError` unless the saved parameter groups are as large as those of this run."""
        sizes, own = ([len(group["params"]) for group in groups] for groups in (saved, self.optimizer.param_groups))
        if sizes != own:
            raise InputError(
                f"{path} was written by a run with other parameter groups (tensors in each: {shown(sizes)}; now {shown(own)}). They depend on which weights "
                "come from a file: use the --pretrained_encoder or --pretrained_model of that run, and the same version of the bundle."
            )

    def continue_from_last(self, engine: Engine) -> None:
        """Load ``last.pt``, and set the engine and the sampler to the step after it.

        If the run was stopped during a validation, that validation is repeated first.
        """
        path = self.folder / "last.pt"
        state = self._read_last(path)
        if state is None:
            logger.info("--resume true: %s does not exist; the run starts at step 0", path)
            if rank() == 0:
                self.set_aside(engine)
            return
        changed = self._check_settings(state, path)
        self._check_groups(state["optimizer"]["param_groups"], path)
        self._restore_training(engine, state, changed)
        self._restore_scores(engine, state, changed)
        self._end_if_stale(engine)
        if rank() == 0 and engine.state.epoch < engine.state.max_epochs:
            self._set_aside(*RESULTS, numbered=self.keep_results)  # results of the same run with fewer steps
        logger.info("%s: the run continues after step %d", path, state["step"])
        restore_random_states(state["random"])
        ends_epoch = engine.state.iteration % engine.state.epoch_length == 0
        if ends_epoch and not state["validated"]:
            engine.fire_event(Events.EPOCH_COMPLETED)  # validate, track and save, which the stop prevented
        self.random = random_states()

    def _read_last(self, path: Path) -> Mapping[str, Any] | None:
        """Return the saved state; None if there is none. All processes must see the same file."""
        state = load_checkpoint_file(str(path)) if path.exists() else None
        steps = gather_lists([state.get("step") if isinstance(state, Mapping) else None])
        if len(set(steps)) > 1:
            found = shown(["no file" if step is None else step for step in steps])
            raise InputError(
                f"The processes do not see the same {path}: its step is {found}. All nodes must share --output_dir."
            )
        needed = {*self.stateful, *STATE} - {"average"}
        if state is not None and (not isinstance(state, Mapping) or needed - set(state)):
            lacks = f" (it has no {listed(sorted(needed - set(state)))})" if isinstance(state, Mapping) else ""
            raise InputError(
                f"{path} is not a last.pt that this version wrote{lacks}, so the run cannot be resumed from it. Use another "
                "--output_dir."
            )
        return state

    def _restore_training(self, engine: Engine, state: Mapping[str, Any], changed: Sequence[str]) -> None:
        """Load weights, optimiser, schedule and counts. Options come from this run, progress from the checkpoint."""
        options = [dict(group) for group in self.optimizer.param_groups]
        schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k in SCHEDULE_OPTIONS}
        # how the optimiser computes depends on this machine, not on the saved run
        for saved, group in zip(state["optimizer"]["param_groups"], options, strict=False):
            saved.update({name: group[name] for name in ("foreach", "fused") if name in group})
        for name, target in self.stateful.items():
            if name == "average" and name not in state:  # --resume_changes average_steps
                self.average.start_anew()
            else:
                with trusted_weights():  # its settings were compared
                    target.load_state_dict(state[name])
        if changed:
            for group, option in zip(self.optimizer.param_groups, options, strict=True):
                group.update({name: value for name, value in option.items() if name not in ("params", "lr")})
            self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **schedule})
            self.lr_scheduler.last_epoch -= 1
            self.lr_scheduler.step()  # sets the learning rate of this step by the new schedule
        if engine.scaler is not None and state["scaler"]:
            engine.scaler.load_state_dict(state["scaler"])
        for name, value in state["counts"].items():
            setattr(engine.state, name, value)
        engine.state.skipped_in_a_row = 0  # skipped steps before the stop do not count
        engine.state.iteration = state["step"] * engine.accumulation_steps
        engine.state.epoch = engine.state.iteration // engine.state.epoch_length
        self.sampler.first = engine.state.iteration

    def _restore_scores(self, engine: Engine, state: Mapping[str, Any], changed: Sequence[str]) -> None:
        """Take over the validation scores, unless a changed setting makes them incomparable."""
        comparable = not self.of_the_scores.intersection(changed)
        self.best = state["best"] if comparable else None
        if self.best is not None and not self._best_is_there():
            self.best, self.best_lost = None, True
        if not comparable:
            logger.warning(
                "The best %s so far (%s) is discarded: it was measured with other settings.", self.score, state["best"]
            )
        self.best_epoch = state["best_epoch"] if not changed else engine.state.epoch
        self.moved = comparable and state.get("moved", True)
        self.scores[:] = [list(point) for point in state.get("scores", ())] if comparable else []

    def _best_is_there(self) -> bool:
        """Return whether ``best.pt`` can be read; all ranks see the same file."""
        try:
            load_checkpoint_file(str(self.folder / "best.pt"))
        except InputError as error:
            logger.warning(
                "%s The best validation so far (%s %.4g) is forgotten; the next one writes the file again.",
                *(sentence(str(error)), self.score, self.best),
            )
            return False
        return True

    def continue_random(self, engine: Engine) -> None:
        """Restore the generators at the first batch.

        Creating the data loader draws a random number that an uninterrupted run would not draw here.
        """
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
        """Write ``last.pt``, and ``best.pt`` if this epoch's validation is the best so far."""
        if engine.should_terminate:  # a stop interrupted the validation
            return
        score = None if self.evaluator is None else float(self.evaluator.state.metrics[self.score])
        # without a validation every epoch is the best so far; a NaN score never is
        finite = score is not None and score == score
        if finite:
            self.scores.append([steps_done(engine), score])
        same = finite and score == self.best and not self.moved
        if score is None or (finite and (self.best is None or self.sign * score > self.sign * self.best)) or same:
            self.moved |= self.best is not None and not same
            self.best, self.best_epoch = score, engine.state.epoch
            if rank() == 0:
                save_atomically(self._result(engine, score), self.folder / "best.pt")
        elif finite:
            self.moved = True
        if score is None or finite:  # for a NaN score, keep the last valid state
            self._save_last(engine, validated=True)
        self._end_if_stale(engine)

    def _end_if_stale(self, engine: Engine) -> None:
        """End the run after this epoch if early stopping applies.

        Ignite's own handler terminates the engine, which here means that the run was interrupted.
        """
        since = engine.state.epoch - self.best_epoch
        if self.early_stopping is None or since < self.early_stopping or engine.state.epoch >= engine.state.max_epochs:
            return
        if rank() == 0:
            logger.info("early stopping: no better %s in the last %s", self.score, counted(since, "validation"))
        engine.state.max_epochs = engine.state.epoch

    def terminated(self, engine: Engine) -> None:
        """Write ``last.pt`` in the middle of an epoch."""
        self._save_last(engine, validated=False)
        if rank() == 0 and (skipped := getattr(engine.state, "skipped_in_a_row", 0)):
            logger.warning(
                "last.pt stays as it was, because the last %s skipped: a run that goes on repeats the steps since then",
                counted(skipped, "step was", "steps were"),
            )

    def _save_last(self, engine: Engine, *, validated: bool) -> None:
        # after skipped steps, keep the last valid state
        if rank() != 0 or getattr(engine.state, "skipped_in_a_row", 0):
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
            "moved": self.moved,
            "scores": self.scores,
            "encoder": self.encoder,
            "settings": self.settings,
        }
        save_atomically(state, self.folder / "last.pt")

    def completed(self, engine: Engine) -> None:
        """Write the result of the run."""
        best = self.folder / "best.pt"
        if self.best_lost and self.best is None:
            raise InputError(
                f"{best} cannot be read, and no validation of this run was left to write it again. Train on: more --max_steps, "
                "with --resume true --resume_changes \"['max_steps']\"."
            )
        if not best.exists():
            raise InputError(
                f"No validation of this run gave a finite {self.score}: there are no weights to save. If the losses in "
                "training_log.csv are not finite either, the training diverged: lower --learning_rate or raise --warmup_steps, "
                "and start again. If they are, the validation cannot measure this score: choose another one."
            )
        result = load_checkpoint_file(str(best))
        if self.score not in result["trained"]["score"]:
            raise InputError(
                f"{best} was chosen by {', '.join(result['trained']['score'])}, and this run had no validation that measures "
                f"{self.score}. Train on: more --max_steps, with --resume true --resume_changes \"['max_steps','select_by']\"."
            )
        if self.evaluator is not None and not self.moved and len(self.scores) > 1:
            logger.warning(
                "%s was %s in all %d validations, so it chose nothing: these are the weights of the last one. Does the "
                "validation hold what is learnt, and is the training long enough?",
                *(self.score, self.best, len(self.scores)),
            )
        if self.encoder_file:
            parts = {"encoder.pt": encoder_state(self.network)}
            if trains_decoder(self.network):
                decoder = decoder_state(self.network)
                heads = [name for name in result["model"] if self.kept_heads and name.startswith(self.kept_heads)]
                parts["network.pt"] = {*parts["encoder.pt"], *decoder, *heads}
            for file, part in parts.items():
                state = {name: tensor for name, tensor in result["model"].items() if name in part}
                content = {"state_dict": state, "encoder": self.encoder, "trained": result["trained"]}
                save_atomically(content, self.folder / file)
        save_atomically(result, self.folder / "model.pt")
        score = result["trained"]["score"][self.score]
        logger.info(
            "wrote %s: the weights of step %d%s",
            *(self.folder / "model.pt", result["trained"]["steps"]),
            "" if score is None else f", {self.score} {score:.4f}",
        )
