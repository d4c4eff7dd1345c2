# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Put the weights of a file into a network: every tensor of what is loaded, or an error that lists the difference."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint_file import load_checkpoint_file
from .input_error import InputError

logger = logging.getLogger(__name__)

ENCODER_PREFIX = "swinViT."


def _load(network: torch.nn.Module, state: Mapping[str, torch.Tensor], wanted: set[str], path: str) -> None:
    own = network.state_dict()
    missing = sorted(wanted - set(state))
    surplus = sorted(set(state) - wanted)
    shapes = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in sorted(wanted & set(state))
        if state[name].shape != own[name].shape
    ]
    if missing or surplus or shapes:
        said = [f"{len(missing)} tensors missing (first: {missing[0]})"] if missing else []
        said += [f"{len(surplus)} that the network does not have (first: {surplus[0]})"] if surplus else []
        said += [f"{len(shapes)} of another shape (first: {shapes[0]})"] if shapes else []
        raise InputError(f"{path} does not fit the network: {'; '.join(said)}. Nothing was loaded.")
    network.load_state_dict(dict(state), strict=False)
    logger.info("%s: loaded %d of %d tensors of the network", path, len(wanted), len(own))


def load_encoder(network: torch.nn.Module, path: str) -> None:
    """Load ``encoder.pt`` into ``network.swinViT``; the rest of the network keeps its values.

    Args:
        network: `SwinUNETR` or the pre-training network.
        path: file written by the pre-training bundle: ``{"state_dict", "encoder", "trained"}``.

    Raises:
        InputError: unless all tensors of the encoder, and no others, are in the file with the right shapes.
    """
    content = load_checkpoint_file(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise InputError(f"{path} is not an encoder.pt of these bundles: it has no 'state_dict'.")
    wanted = {name for name in network.state_dict() if name.startswith(ENCODER_PREFIX)}
    _load(network, content["state_dict"], wanted, path)


def load_model(network: torch.nn.Module, path: str, *, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load ``model.pt`` (``{"model", "encoder", "trained", ...}``) into the whole network.

    Args:
        network: the network, bare.
        path: file written by `training_checkpoint.TrainingCheckpoint`.
        expected: settings of this run, such as ``spacing``, to compare with those of the training: a difference is logged
            as a warning, since weights trained on other voxels load without a word.

    Returns:
        The file's content without the weights.

    Raises:
        InputError: unless the file has exactly the tensors of the network.
    """
    content = load_checkpoint_file(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise InputError(f"{path} is not a model.pt of these bundles: it has no 'model'.")
    _load(network, content["model"], set(network.state_dict()), path)
    trained = content.get("trained", {})
    for name, value in (expected or {}).items():
        value = list(value) if isinstance(value, tuple) else value
        if name in trained and trained[name] != value:
            logger.warning("%s was trained with %s %s; this run uses %s", path, name, trained[name], value)
    return {key: value for key, value in content.items() if key != "model"}


def encoder_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the encoder on the CPU, under the names that `SwinUNETR` uses."""
    return {k: v.detach().cpu() for k, v in network.state_dict().items() if k.startswith(ENCODER_PREFIX)}
