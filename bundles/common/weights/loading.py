# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Load the weights of a file into a network: all of them, or an error that lists the differences."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..networks.patch_merging import MERGING
from ..value_rules import check_choice
from ..words import counted, shown
from .checkpoint_file import release_checkpoint
from .dialects import ANCHOR, ENCODER, FoundWeights, find_weights
from .merging_guard import trusted_weights
from .module_table import module_table, table_text

logger = logging.getLogger(__name__)

DECODER = re.compile(r"(encoder\d+|decoder\d+)\.")
PATCH_EMBED = ENCODER + ANCHOR
NAMES = {"dialect": "layout of the file", "missing": "starts anew", "left_over": "left aside", "patch_embed": "input"}
DERIVED = ".attn.relative_position_index"  # a buffer determined by the window size; some files lack it


def fit_patch_embedding(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Adapt the weights of a 1-channel patch embedding (E, 1, p, p, p) to several channels, (E, channels, p, p, p).

    The weights are repeated and divided by the number of channels, so that equal channels give the same response as the
    single channel.
    """
    return weight.repeat(1, channels, 1, 1, 1) / channels


def _size(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def short_list(names: Sequence[str]) -> str:
    """Return the only name, or the first and the last."""
    return f"{names[0]}" if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def check_numbers(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Raise `InputError` unless all tensors are finite numbers in float32; log if they have another precision."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(
                f"{path} does not fit the network: {name} has the type {tensor.dtype}, not floating-point numbers (a "
                "quantised network?). Nothing was loaded. Use the file that was written before the quantisation."
            )
    broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all())
    if broken:
        raise InputError(
            f"{path} does not fit the network: {len(broken)} with non-finite values ({short_list(broken)}). Nothing was "
            "loaded. Use an earlier checkpoint."
        )
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    if types:
        logger.info("%s: weights of type %s are converted to float32", path, ", ".join(types))


def load_exactly(
    network: torch.nn.Module,
    state: dict[str, torch.Tensor],
    wanted: set[str],
    path: str,
    *,
    patch_embed: str | None = None,
    allow_partial: Sequence[str] = (),
) -> dict[str, Any]:
    """Load the tensors ``wanted`` from ``state``, all of them or none.

    Args:
        network: the network.
        state: tensors under the names of the network.
        wanted: names in the network that must be loaded.
        path: the file, for messages.
        patch_embed, allow_partial: see `load_encoder`.

    Returns:
        The number of loaded tensors, the names that keep their values, how the patch embedding was changed, and the
        table by module.

    Raises:
        InputError: tensors are missing, left over, or have another shape.
    """
    own = network.state_dict()
    state = dict(state)
    if patch_embed is not None:
        check_choice(name="patch_embed", value=patch_embed, choices=("repeat", "fresh"))
    report: dict[str, Any] = {}
    fresh: set[str] = set()
    differs = PATCH_EMBED in wanted and PATCH_EMBED in state and state[PATCH_EMBED].shape != own[PATCH_EMBED].shape
    if PATCH_EMBED in state and (patch_embed == "fresh" or (patch_embed and differs)):
        in_file, in_network = state[PATCH_EMBED].shape[1], own[PATCH_EMBED].shape[1]
        if patch_embed == "repeat" and in_file == 1 and state[PATCH_EMBED].shape[2:] == own[PATCH_EMBED].shape[2:]:
            state[PATCH_EMBED] = fit_patch_embedding(state[PATCH_EMBED], in_network)
        elif patch_embed == "fresh":
            fresh = {PATCH_EMBED, PATCH_EMBED.replace("weight", "bias")}
            state = {name: tensor for name, tensor in state.items() if name not in fresh}
        report["patch_embed"] = f"{in_file} to {in_network} channels: {patch_embed}"
    derived = {name for name in wanted if name.endswith(DERIVED)}
    absent = sorted(wanted - set(state) - derived - fresh)
    allowed = [name for name in absent if begins_with(name, allow_partial)]
    missing = [name for name in absent if name not in allowed]
    surplus = sorted(set(state) - wanted)
    shapes = [
        f"{name} {_size(state[name])} in the file, {_size(own[name])} in the network"
        for name in sorted(wanted & set(state))
        if state[name].shape != own[name].shape
    ]
    faults = [f"{counted(len(missing), 'tensor')} missing ({short_list(missing)})"] if missing else []
    faults += [f"{len(surplus)} that the network does not have ({short_list(surplus)})"] if surplus else []
    faults += [f"{len(shapes)} with a different shape (first: {shapes[0]})"] if shapes else []
    if not faults and any(
        name in state and not torch.equal(state[name], own[name].to(state[name])) for name in derived
    ):
        faults = ["relative_position_index belongs to another window size"]
    if faults:
        raise InputError(f"{path} does not fit the network: {'; '.join(faults)}. Nothing was loaded.")
    for entry in allow_partial:
        if not any(begins_with(name, [entry]) for name in wanted):
            raise InputError(
                f"--allow_partial {entry!r} does not match the beginning of any tensor name, such as layers4.0.blocks.0.norm1.weight."
            )
    loaded = {name: tensor for name, tensor in state.items() if name in wanted and name not in derived}
    check_numbers(loaded, path)
    with trusted_weights():
        network.load_state_dict(loaded, strict=False)
    part = "weights" if wanted == set(own) else "encoder weights"
    if unloaded := allowed + sorted(fresh):
        logger.info(
            "%s: loaded %s of the %s; %d of the network keep their values",
            *(path, counted(len(loaded), "tensor"), part, len(unloaded)),
        )
    else:
        logger.info("%s: all %s loaded (%s)", path, part, counted(len(loaded), "tensor"))
    return {"loaded": len(loaded), "missing": unloaded, **report, "modules": module_table(network, loaded)}


def check_merging(network: torch.nn.Module, found: FoundWeights) -> None:
    """Raise `InputError` if the file records another patch-merging order than the network was built with."""
    record = found.content.get("encoder")
    wanted = record.get("merging") if isinstance(record, Mapping) else None
    built = type(network.swinViT.layers1[0].downsample)
    if wanted in MERGING and built is not MERGING[wanted]:
        raise InputError(
            f"{found.path} needs patch merging {wanted}, but the network was built with {built.__name__}. Nothing was loaded."
        )


def log_report(report: Mapping[str, Any], *, table: bool = True) -> None:
    """Log what was recognised, what is randomly initialised, what was left out, and the table by module."""
    for name in ("dialect", "classes", "patch_embed", "missing", "left_over"):
        if report.get(name):
            value = report[name]
            if name in ("missing", "left_over"):
                value = f"{counted(len(value), 'tensor')} ({short_list(value)})"
            logger.info("  %s: %s", NAMES.get(name, name), shown(value))
    if table:
        logger.info("weights by module:\n%s", table_text(report["modules"]))


def load_encoder(
    network: torch.nn.Module, path: str, *, patch_embed: str = "repeat", allow_partial: Sequence[str] = ()
) -> dict[str, Any]:
    """Load the encoder of any Swin UNETR checkpoint into ``network.swinViT``; the rest of the network is unchanged.

    Args:
        network: `SwinUNETR` or the pre-training network.
        path: a file that `find_weights` reads: an encoder, an encoder with proxy-task heads, or a whole segmentation
            network.
        patch_embed: what to do if the file has another number of channels: ``repeat`` 1-channel weights
            (`fit_patch_embedding`), or keep the initial patch embedding (``fresh``, for any number of channels).
        allow_partial: beginnings of tensor names (without ``swinViT.``) that may be missing, such as ``layers4``.

    Returns:
        ``file``, ``dialect``, ``loaded`` (number of tensors), ``missing`` and ``left_over`` (names), ``modules``
        (`module_table`), and ``patch_embed`` if it was changed.

    Raises:
        InputError: the file lacks a tensor of the encoder that is not in ``allow_partial``, or shapes differ. Nothing
            is loaded then.
    """
    found = find_weights(path)
    check_merging(network, found)
    wanted = {name for name in network.state_dict() if name.startswith(ENCODER)}
    allow_partial = [allow_partial] if isinstance(allow_partial, str) else list(allow_partial)
    loaded = load_exactly(network, found.encoder, wanted, path, patch_embed=patch_embed, allow_partial=allow_partial)
    release_checkpoint(path)
    report = {"file": str(path), "dialect": list(found.dialect), **loaded, "left_over": sorted(found.rest)}
    log_report(report)
    _log_decoder(found)
    return report


def _log_decoder(found: FoundWeights) -> None:
    """Log how much of the file is a decoder that `load_whole_network` would take as well."""
    decoder = sum(tensor.numel() for name, tensor in found.rest.items() if DECODER.match(name))
    total = sum(tensor.numel() for tensor in (*found.encoder.values(), *found.rest.values()))
    if decoder:
        logger.info(
            "%s holds a whole Swin UNETR: %.0f%% of it, the decoder, is left aside; --pretrained_model takes it, too",
            *(found.path, 100 * decoder / total),
        )


def _check_whole(network: torch.nn.Module, found: FoundWeights) -> None:
    """Refuse the part of a pre-trained network that a training starts from, where a trained model is expected.

    Raises:
        InputError: the network has an output layer, and the file has none.
    """
    if not hasattr(network, "out") or any(name.startswith("out.") for name in found.rest):
        return
    if any(DECODER.match(name) for name in found.rest):
        part, name, option = "encoder and decoder of a pre-trained network", "network.pt", "pretrained_model"
    else:
        part, name, option = "an encoder alone", "encoder.pt", "pretrained_encoder"
    raise InputError(
        f"{found.path} holds {part} without an output layer (like {name}): a training starts from it, by --{option}. Here a "
        "trained model is needed, such as the model.pt that a training writes to models/ of its output."
    )


def load_model(network: torch.nn.Module, path: str, *, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load a whole network, of these bundles or any `SwinUNETR`.

    Args:
        network: the network, without ``DistributedDataParallel``.
        path: a file that `find_weights` reads.
        expected: settings of this run, such as ``spacing``, to compare with those of the training. A difference is
            logged as a warning, because weights trained on other voxels load without any error.

    Returns:
        See `load_encoder`.

    Raises:
        InputError: the tensors of the file are not exactly those of the network.
    """
    found = find_weights(path)
    _check_whole(network, found)
    check_merging(network, found)
    loaded = load_exactly(network, {**found.encoder, **found.rest}, set(network.state_dict()), path)
    trained = found.content.get("trained") or {}
    for name, value in (expected or {}).items():
        value = list(value) if isinstance(value, tuple) else value
        if name in trained and trained[name] != value:
            logger.warning(
                "%s was trained with %s %s; this run uses %s", path, name, shown(trained[name]), shown(value)
            )
    release_checkpoint(path)
    report = {"file": str(path), "dialect": list(found.dialect), **loaded, "left_over": []}
    log_report(report, table=False)
    return report


def begins_with(name: str, entries: Sequence[str]) -> bool:
    """Return whether the name of a tensor begins with an entry of ``--allow_partial``; both with or without `ENCODER`."""
    return name.removeprefix(ENCODER).startswith(tuple(entry.removeprefix(ENCODER) for entry in entries))


def encoder_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the encoder on the CPU, under the names of `SwinUNETR`."""
    return {k: v.detach().cpu() for k, v in network.state_dict().items() if k.startswith(ENCODER)}


def trains_decoder(network: torch.nn.Module) -> bool:
    """Return whether a network has a decoder, and training changes it."""
    return any(each.requires_grad for name, each in network.named_parameters() if DECODER.match(name))


def decoder_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the decoder, without the last layer, on the CPU, under the names of `SwinUNETR`."""
    return {k: v.detach().cpu() for k, v in network.state_dict().items() if DECODER.match(k)}
