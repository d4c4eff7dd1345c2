# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Put the weights of a file into a network: every tensor of what is loaded, or an error that lists the difference."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..networks.patch_merging import MERGING
from ..run.options import check_choice
from .checkpoint_file import release_checkpoint
from .dialects import ANCHOR, ENCODER, FoundWeights, find_weights

logger = logging.getLogger(__name__)

PATCH_EMBED = ENCODER + ANCHOR
DERIVED = ".attn.relative_position_index"  # a buffer that follows from the window; some files leave it out


def fit_patch_embedding(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Weights of a 1-channel patch embedding (E, 1, p, p, p) for several channels, (E, channels, p, p, p).

    Repeated and divided by their number, so that equal channels give the response that the one channel gave.
    """
    return weight.repeat(1, channels, 1, 1, 1) / channels


def _first(names: Sequence[str]) -> str:
    return f"{names[0]}" if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def _load(
    network: torch.nn.Module,
    state: dict[str, torch.Tensor],
    wanted: set[str],
    path: str,
    *,
    patch_embed: str | None = None,
    allow_partial: Sequence[str] = (),
) -> dict[str, Any]:
    """Load ``state`` as far as ``wanted``; returns names that stay as they are, and what became of the patch embedding."""
    own = network.state_dict()
    state = dict(state)
    if patch_embed is not None:
        check_choice(name="patch_embed", value=patch_embed, choices=("repeat", "fresh"))
    report: dict[str, Any] = {}
    fresh: set[str] = set()
    differs = PATCH_EMBED in wanted and PATCH_EMBED in state and state[PATCH_EMBED].shape != own[PATCH_EMBED].shape
    if PATCH_EMBED in state and (patch_embed == "fresh" or (patch_embed and differs)):
        theirs, ours = state[PATCH_EMBED].shape[1], own[PATCH_EMBED].shape[1]
        if patch_embed == "repeat" and theirs == 1 and state[PATCH_EMBED].shape[2:] == own[PATCH_EMBED].shape[2:]:
            state[PATCH_EMBED] = fit_patch_embedding(state[PATCH_EMBED], ours)
        elif patch_embed == "fresh":
            fresh = {PATCH_EMBED, PATCH_EMBED.replace("weight", "bias")}
            state = {name: tensor for name, tensor in state.items() if name not in fresh}
        report["patch_embed"] = f"{theirs} to {ours} channels: {patch_embed}"
    derived = {name for name in wanted if name.endswith(DERIVED)}
    absent = sorted(wanted - set(state) - derived - fresh)
    allowed = (
        [name for name in absent if name.removeprefix(ENCODER).startswith(tuple(allow_partial))]
        if allow_partial
        else []
    )
    missing = [name for name in absent if name not in allowed]
    surplus = sorted(set(state) - wanted)
    shapes = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in sorted(wanted & set(state))
        if state[name].shape != own[name].shape
    ]
    said = [f"{len(missing)} tensors missing ({_first(missing)})"] if missing else []
    said += [f"{len(surplus)} that the network does not have ({_first(surplus)})"] if surplus else []
    said += [f"{len(shapes)} of another shape (first: {shapes[0]})"] if shapes else []
    if not said and any(name in state and not torch.equal(state[name], own[name].to(state[name])) for name in derived):
        said = ["relative_position_index is that of another window"]
    broken = [name for name in sorted(wanted & set(state)) if not torch.isfinite(state[name]).all()]
    said += [f"{len(broken)} with values that are not finite ({_first(broken)})"] if broken else []
    if said:
        raise InputError(f"{path} does not fit the network: {'; '.join(said)}. Nothing was loaded.")
    for entry in allow_partial:
        if not any(name.removeprefix(ENCODER).startswith(entry) for name in wanted):
            raise InputError(
                f"--allow_partial {entry!r} is the beginning of no tensor's name, such as layers4.0.blocks.0.norm1.weight."
            )
    taken = {name: tensor for name, tensor in state.items() if name in wanted and name not in derived}
    network.load_state_dict(taken, strict=False)
    logger.info("%s: loaded %d of %d tensors of the network", path, len(taken), len(own))
    return {"loaded": len(taken), "missing": allowed + sorted(fresh), **report}


def _check_merging(network: torch.nn.Module, found: FoundWeights) -> None:
    """A file that says which merging it wants is not loaded into a network with the other one."""
    record = found.content.get("encoder")
    wanted = record.get("merging") if isinstance(record, Mapping) else None
    built = type(network.swinViT.layers1[0].downsample)
    if wanted in MERGING and built is not MERGING[wanted]:
        raise InputError(
            f"{found.path} wants patch merging {wanted}, but the network was built with {built.__name__}. Nothing was loaded."
        )


def _say(report: Mapping[str, Any]) -> None:
    for name in ("dialect", "missing", "left_over", "patch_embed"):
        if report.get(name):
            logger.info("  %s: %s", name.replace("_", " "), report[name])


def load_encoder(
    network: torch.nn.Module, path: str, *, patch_embed: str = "repeat", allow_partial: Sequence[str] = ()
) -> dict[str, Any]:
    """Load the encoder of any Swin UNETR checkpoint into ``network.swinViT``; the rest of the network keeps its values.

    Args:
        network: `SwinUNETR` or the pre-training network.
        path: a file that `find_weights` reads: an encoder, an encoder with proxy-task heads, or a whole segmentation network.
        patch_embed: what to do where the file has another number of channels: ``repeat`` 1-channel weights (`fit_patch_embedding`), or leave the
            patch embedding ``fresh``.
        allow_partial: beginnings of names that may be missing (without ``swinViT.``), such as ``layers4``.

    Returns:
        ``file``, ``dialect``, ``loaded`` (number of tensors), ``missing`` and ``left_over`` (names), and ``patch_embed`` where it was changed.

    Raises:
        InputError: unless the whole encoder, as far as it was asked for, is in the file with the right shapes; then nothing is loaded.
    """
    found = find_weights(path)
    _check_merging(network, found)
    wanted = {name for name in network.state_dict() if name.startswith(ENCODER)}
    allow_partial = [allow_partial] if isinstance(allow_partial, str) else list(allow_partial)
    loaded = _load(network, found.encoder, wanted, path, patch_embed=patch_embed, allow_partial=allow_partial)
    release_checkpoint(path)
    report = {"file": str(path), "dialect": list(found.dialect), **loaded, "left_over": sorted(found.rest)}
    _say(report)
    return report


def load_model(network: torch.nn.Module, path: str, *, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load a whole network, ours or any `SwinUNETR`.

    Args:
        network: the network, bare.
        path: a file that `find_weights` reads.
        expected: settings of this run, such as ``spacing``, to compare with those of the training: a difference is logged
            as a warning, since weights trained on other voxels load without a word.

    Returns:
        As `load_encoder`.

    Raises:
        InputError: unless the file has exactly the tensors of the network.
    """
    found = find_weights(path)
    _check_merging(network, found)
    loaded = _load(network, {**found.encoder, **found.rest}, set(network.state_dict()), path)
    trained = found.content.get("trained") or {}
    for name, value in (expected or {}).items():
        value = list(value) if isinstance(value, tuple) else value
        if name in trained and trained[name] != value:
            logger.warning("%s was trained with %s %s; this run uses %s", path, name, trained[name], value)
    release_checkpoint(path)
    report = {"file": str(path), "dialect": list(found.dialect), **loaded, "left_over": []}
    _say(report)
    return report


def encoder_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the encoder on the CPU, under the names that `SwinUNETR` uses."""
    return {k: v.detach().cpu() for k, v in network.state_dict().items() if k.startswith(ENCODER)}
