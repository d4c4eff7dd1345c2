# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Build a bundle's training engine from its train.yaml and run it on batches in memory.

Network, views, loss, optimiser and the handlers that take part in a step come from the config. Data lists, files, logs
and validation are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
OF_A_STEP = ("StepOutput", "NoScalingOfBfloat16", "GradientGuard", "StepSchedule")


def training_config(
    bundle: str,
    *,
    handlers: Sequence[str] = OF_A_STEP,
    fast: bool = True,
    compile_backend: str = "inductor",
    **options: Any,
) -> ConfigParser:
    """Load a bundle's train.yaml without its data, to get components from by their ids.

    Args:
        bundle: name of the bundle's folder.
        handlers: class names of the handlers to keep.
        fast: whether to build the network with the fast path.
        compile_backend: backend of ``torch.compile``, if the option ``compile`` is given.
        options: options of train.yaml, as on the command line.
    """
    folder = BUNDLES / bundle
    text = (folder / "configs" / "train.yaml").read_text()
    # Each bundle calls its package "scripts"; under its full name, several bundles can be used in one process.
    config = yaml.safe_load(text.replace(" scripts.", f" bundles.{bundle}.scripts."))
    if "pretrained_model" in config:
        config["pretrained_model"] = None  # its expression refers to a handler that is removed here
    config |= {"bundle_root": str(folder), "tensorboard": False, **options}
    config["network_def"]["fast"] = fast
    config["compiled"]["backend"] = compile_backend
    train = config["train"]
    train["handlers"] = [each for each in train["handlers"] if each["_target_"].rsplit(".", 1)[-1] in handlers]
    train |= {"scans": [], "dataset": None, "dataloader": None, "prefetch": None}
    return ConfigParser(config)


def engine_steps(trainer: SupervisedTrainer, batches: Sequence[Mapping[str, Any]]) -> Callable[[], float]:
    """Return a function that runs the engine once over the batches and returns the last loss."""
    trainer.data_loader = batches
    trainer.state.epoch_length, trainer.state.max_epochs = len(batches), 1

    def steps() -> float:
        trainer.run()
        return float(trainer.state.output[0]["loss"])

    return steps
