# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Checkpoints of a training run: the last state to resume from, the best weights so far, and the result at the end."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite
import monai
import numpy as np
import torch
from ignite.engine import Engine, Events

from .checkpoint_file import load_checkpoint_file, save_atomically
from .distributed import bare, rank
from .input_error import InputError
from .seeded_crops import DrawSampler
from .weights import encoder_state

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


class TrainingCheckpoint:
    """Handler for `SupervisedTrainer`; put it behind the validation handler, so that it sees this epoch's score.

    Files under ``folder``: ``last.pt`` after every epoch (everything that a resumed run needs to be the same run), ``best.pt`` (weights of the
    best validation so far), and when the run is complete ``model.pt`` with the best weights; a file of that name is never a half-trained one.
    With ``encoder_file``, ``encoder.pt`` too.

    Args:
        folder: where the files go.
        network, optimizer, lr_scheduler: objects whose state is kept.
        sampler: told the step to go on from.
        encoder: encoder record (`swin_encoder.FIELDS`).
        details: more entries of ``model.pt`` beside the weights, such as ``out_channels`` and ``labels``.
        trained: what to say of the training, such as data, preset and proxy tasks.
        score: name of the validation metric that chooses the best, read from ``evaluator.state.metrics``.
        evaluator: the validation engine, or None when the run has none: the last weights are then the result.
        higher_is_better: direction of the score.
        resume: continue from ``last.pt`` if it is there.
        encoder_file: also write ``encoder.pt``.
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
        score: str,
        evaluator: Engine | Callable | None = None,
        higher_is_better: bool = True,
        resume: bool = False,
        encoder_file: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.stateful = {"network": bare(network), "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.network = bare(network)
        self.sampler = sampler
        self.encoder = dict(encoder)
        self.details = dict(details)
        self.trained = dict(trained)
        self.score = score
        self.evaluator = evaluator
        self.sign = 1 if higher_is_better else -1
        self.resume = resume
        self.encoder_file = encoder_file
        self.best: float | None = None
        self.random: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """All ranks resume, rank 0 alone writes."""
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.continue_from_last)
            engine.add_event_handler(Events.GET_BATCH_STARTED, self.continue_random)
        if rank() == 0:
            if not self.resume:
                engine.add_event_handler(Events.STARTED, self.set_aside)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
            engine.add_event_handler(Events.COMPLETED, self.completed)

    def set_aside(self, engine: Engine) -> None:
        """Rename what an earlier run left in this folder, lest it pass for this run's: ``previous_last.pt`` and so on."""
        for name in ("last.pt", "best.pt", "model.pt", "encoder.pt"):
            if (self.folder / name).exists():
                os.replace(self.folder / name, self.folder / f"previous_{name}")

    def continue_from_last(self, engine: Engine) -> None:
        """Load ``last.pt`` and set the engine and the sampler to the step after it."""
        path = self.folder / "last.pt"
        if not path.exists():
            logger.info("--resume true: %s is not there, the run starts at step 0", path)
            return
        state = load_checkpoint_file(str(path))
        if state["encoder"] != self.encoder or state["epoch_length"] != engine.state.epoch_length:
            raise InputError(
                f"{path} belongs to another run: its encoder is {state['encoder']} with {state['epoch_length']} steps between validations, "
                f"this run's is {self.encoder} with {engine.state.epoch_length}. Start it with the options of that run, "
                "or choose another --output_dir."
            )
        for name, target in self.stateful.items():
            target.load_state_dict(state[name])
        if engine.scaler is not None and state["scaler"] is not None:
            engine.scaler.load_state_dict(state["scaler"])
        self.random = state["random"]
        self.best = state["best"]
        engine.state.epoch, engine.state.iteration = state["epoch"], state["step"]
        self.sampler.first_step = state["step"]
        logger.info("%s: the run goes on after step %d", path, state["step"])

    def continue_random(self, engine: Engine) -> None:
        """Restore the generators at the first batch: the data loader, built anew in between, takes a number that the unbroken run did not."""
        if self.random is not None:
            restore_random_states(self.random)
            self.random = None

    def _result(self, engine: Engine, score: float | None) -> dict[str, Any]:
        trained = self.trained | {
            "steps": engine.state.iteration,
            "score": {self.score: score},
            "versions": {"monai": monai.__version__, "torch": str(torch.__version__), "ignite": ignite.__version__},
        }
        model = {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}
        return {"model": model, "encoder": self.encoder, **self.details, "trained": trained}

    def epoch_completed(self, engine: Engine) -> None:
        """Write ``last.pt``, and ``best.pt`` if this epoch's validation is better than all before."""
        score = None if self.evaluator is None else float(self.evaluator.state.metrics[self.score])
        # without a validation every epoch is the best so far; a score that is not a number is never one
        if score is None or (score == score and (self.best is None or self.sign * score > self.sign * self.best)):
            self.best = score
            save_atomically(self._result(engine, score), self.folder / "best.pt")
        state = {name: target.state_dict() for name, target in self.stateful.items()}
        state |= {
            "scaler": None if engine.scaler is None else engine.scaler.state_dict(),
            "step": engine.state.iteration,
            "epoch": engine.state.epoch,
            "epoch_length": engine.state.epoch_length,
            "random": random_states(),
            "best": self.best,
            "encoder": self.encoder,
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
