# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The training engine of a bundle as its train.yaml puts it together, on batches that lie in memory.

Networks, views, losses, optimisers and the handlers that take part in a step are those of the config; data lists, files, logs and validation
are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
OF_A_STEP = ("StepOutput", "NoScalingOfBfloat16", "GradientGuard", "StepSchedule")


def training_config(
    bundle: str, *, handlers: Sequence[str] = OF_A_STEP, fast: bool = True, **options: Any
) -> ConfigParser:
    """The config of a training without data, from which components are taken by their ids.

    Args:
        bundle: name of its folder.
        handlers: class names of the handlers to keep.
        fast: of the network.
        options: of train.yaml, as on its command line.
    """
    folder = BUNDLES / bundle
    text = (folder / "configs" / "train.yaml").read_text()
    # Each bundle calls its own package "scripts": by its full name several fit in one process.
    config = yaml.safe_load(text.replace(" scripts.", f" bundles.{bundle}.scripts."))
    if "pretrained_model" in config:
        config["pretrained_model"] = None  # it reads a handler that is left out here
    config |= {"bundle_root": str(folder), "tensorboard": False, **options}
    config["network_def"]["fast"] = fast
    train = config["train"]
    train["handlers"] = [each for each in train["handlers"] if each["_target_"].rsplit(".", 1)[-1] in handlers]
    train |= {"scans": [], "dataset": None, "dataloader": None, "prefetch": None}
    return ConfigParser(config)


def engine_steps(trainer: SupervisedTrainer, batches: Sequence[Mapping[str, Any]]) -> Callable[[], float]:
    """A function that runs the engine over the batches once, and returns the last loss."""
    trainer.data_loader = batches
    trainer.state.epoch_length, trainer.state.max_epochs = len(batches), 1

    def steps() -> float:
        trainer.run()
        return float(trainer.state.output[0]["loss"])

    return steps


def same_weights(network: torch.nn.Module, other: torch.nn.Module) -> None:
    """Give one network the weights of another."""
    network.load_state_dict(other.state_dict())
