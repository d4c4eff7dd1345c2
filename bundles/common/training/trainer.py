# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Build MONAI's trainer and evaluator: for each MONAI version, and with an MLflow server that may go away."""

from __future__ import annotations

import inspect
from typing import Any

import monai
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from ..errors import InputError
from ..run.mlflow_server import tolerate_lost_servers


def supervised_trainer(*, accumulation_steps: int = 1, **arguments: Any) -> SupervisedTrainer:
    """Build MONAI's trainer.

    MONAI Label may run with a MONAI older than 1.6, whose trainer has no ``accumulation_steps``.

    Args:
        accumulation_steps: iterations per step.
        arguments: all other arguments of `SupervisedTrainer`.

    Raises:
        InputError: ``accumulation_steps`` is above 1 and this MONAI does not support it.
    """
    if "train_handlers" in arguments:
        arguments["train_handlers"] = tolerate_lost_servers(arguments["train_handlers"])
    if "accumulation_steps" in inspect.signature(SupervisedTrainer).parameters:
        return SupervisedTrainer(accumulation_steps=accumulation_steps, **arguments)
    if accumulation_steps != 1:
        raise InputError(
            f"--accumulation_steps {accumulation_steps} (or --global_batch_size): MONAI {monai.__version__} cannot accumulate gradients. "
            "Remove the option, or install MONAI 1.6.1 or newer."
        )
    trainer = SupervisedTrainer(**arguments)
    trainer.accumulation_steps = 1  # read by the handlers
    return trainer


def supervised_evaluator(**arguments: Any) -> SupervisedEvaluator:
    """Build MONAI's evaluator. When a run ends it lets go of the last case: its volumes would stay on the GPU.

    Args:
        arguments: those of `SupervisedEvaluator`.
    """
    evaluator = SupervisedEvaluator(
        **arguments | {"val_handlers": tolerate_lost_servers(arguments.get("val_handlers"))}
    )
    evaluator.add_event_handler(Events.COMPLETED | Events.TERMINATE, _let_go_of_the_last_case)
    return evaluator


def _let_go_of_the_last_case(engine: Engine) -> None:
    engine.state.batch, engine.state.output = None, None
