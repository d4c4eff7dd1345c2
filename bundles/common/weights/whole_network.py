# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Start from a whole Swin UNETR of any source: take every tensor that fits, and say which are randomly initialised."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..value_rules import check_choice
from .checkpoint_file import release_checkpoint
from .dialects import find_weights
from .loading import (
    DECODER,
    DERIVED,
    PATCH_EMBED,
    begins_with,
    check_merging,
    check_numbers,
    fit_patch_embedding,
    log_report,
    short_list,
)
from .merging_guard import trusted_weights
from .module_table import module_table

logger = logging.getLogger(__name__)

OUTPUT = ("out.conv.conv.weight", "out.conv.conv.bias")
# Weights that read the image: (features, channels, x, y, z).
INPUT = (PATCH_EMBED, "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight")
LEAST_SHARE = 0.99  # least share of the parameters that the file should fill
# Tensors of published files that are not part of a Swin UNETR: what they are, by the beginning of their names.
EXTRAS = {
    "student.": "projection heads of VoCo",
    "teacher.": "projection heads of VoCo",
    "encoder.mask_token": "mask token of MONAI's self-supervised weights",
    "encoder.norm.": "final norm of MONAI's self-supervised weights",
    "swinViT.norm.": "final norm of a Swin transformer",
    "rotation_head.": "heads of a pre-training",
    "contrastive_head.": "heads of a pre-training",
    "conv.": "heads of a pre-training",
    "position_head.": "heads of a pre-training",
    "organ_embedding": "organ embedding of the Universal Model (SuPreM)",
    "controller.": "controller of the Universal Model (SuPreM)",
    "precls_conv.": "head of the Universal Model (SuPreM)",
    "GAP.": "head of the Universal Model (SuPreM)",
    "text_to_vision.": "head of the Universal Model (SuPreM)",
}


def load_whole_network(
    network: torch.nn.Module, path: str, *, patch_embed: str = "repeat", allow_partial: Sequence[str] = ()
) -> dict[str, Any]:
    """Load all weights of a whole Swin UNETR that fit, in order to train it further.

    - With another number of classes, or without an output layer in the file, the output layer (``out``) is randomly
      initialised.
    - With one channel in the file and several in the network, the weights that read the image are repeated and divided
      by the number of channels (``repeat``), or are randomly initialised (``fresh``, for any number of channels).
    - Known heads of a pre-training (`EXTRAS`) are left out.

    Everything else must fit: at least `LEAST_SHARE` of the other parameters comes from the file, and each tensor of the
    file has its place.

    Args:
        network: `SwinUNETR`.
        path: a file that `find_weights` reads.
        patch_embed: ``repeat`` or ``fresh``; see above.
        allow_partial: beginnings of tensor names (``swinViT.`` may be left out) that may be missing in the file, have
            another shape, or have no place in the network.

    Returns:
        ``file``, ``dialect``, ``loaded`` (number of tensors), ``missing`` (names of randomly initialised tensors),
        ``left_over`` (names without a place), ``modules`` (`module_table`), and ``classes`` or ``patch_embed`` if they
        were changed.

    Raises:
        InputError: the file does not fit; the message names the tensors. Nothing is loaded then.
    """
    check_choice(name="patch_embed", value=patch_embed, choices=("repeat", "fresh"))
    found = find_weights(path)
    check_merging(network, found)
    own = network.state_dict()
    state = {**found.encoder, **found.rest}
    for name in [name for name in state if name.endswith(DERIVED)]:
        if name in own and not torch.equal(state.pop(name), own[name]):
            raise InputError(f"{path} does not fit the network: {name} belongs to another window size.")
    allow_partial = [allow_partial] if isinstance(allow_partial, str) else list(allow_partial)
    report: dict[str, Any] = {}
    fresh = _new_classes(state, own, report) | _new_channels(state, own, patch_embed, report)
    wanted = [name for name in own if not name.endswith(DERIVED) and name not in fresh]

    missing = [name for name in wanted if name not in state]
    other = [name for name in wanted if name in state and state[name].shape != own[name].shape]
    homeless = [name for name in state if name not in own]
    extras = {name: what for name in homeless if (what := _extra(name))}
    _refuse(path, own, state, missing=[name for name in missing if not begins_with(name, allow_partial)], wanted=wanted)
    faults = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in other
        if not begins_with(name, allow_partial)
    ]
    if faults:
        raise InputError(
            f"{path} does not fit the network: {len(faults)} tensors have another shape (first: {faults[0]}). Nothing was "
            "loaded. Build the network of the file, or name what may start anew with --allow_partial."
        )
    if unknown := [name for name in homeless if name not in extras and not begins_with(name, allow_partial)]:
        raise InputError(
            f"{path} has {len(unknown)} tensors without a place in Swin UNETR ({short_list(unknown)}), so it may be another "
            f"network. Nothing was loaded. If they can be left aside: --allow_partial \"['{unknown[0].split('.')[0]}.']\"."
        )
    for entry in allow_partial:
        if not any(begins_with(name, [entry]) for name in (*own, *state)):
            raise InputError(
                f"--allow_partial {entry!r} does not match the beginning of any tensor name, such as decoder1.conv_block."
            )
    taken = {name: state[name] for name in wanted if name in state and name not in other}
    check_numbers(taken, path)
    if not taken:
        raise InputError(f"{path}: no tensor fits the network. Nothing was loaded.")
    with trusted_weights():
        network.load_state_dict(taken, strict=False)
    release_checkpoint(path)
    start_anew = sorted(fresh | {name for name in wanted if name not in taken})
    report = {
        "file": str(path),
        "dialect": list(found.dialect),
        "loaded": len(taken),
        "missing": start_anew,
        "left_over": sorted(homeless),
        **report,
        "modules": module_table(network, taken),
    }
    if extras:
        logger.info("%s: left aside: %s", path, ", ".join(sorted(set(extras.values()))))
    log_report(report)
    return report


def _new_classes(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], report: dict[str, Any]) -> set[str]:
    """Return the tensors of the output layer, and take them out of the file's, if its classes differ or are unknown."""
    weight = OUTPUT[0]
    if weight in state and len(state[weight]) == len(own[weight]):
        return set()
    in_file = f"{len(state[weight])} in the file" if weight in state else "no output layer in the file"
    report["classes"] = f"{in_file}, {len(own[weight])} here: the output layer starts anew"
    for name in OUTPUT:
        state.pop(name, None)
    return set(OUTPUT)


def _new_channels(
    state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], patch_embed: str, report: dict
) -> set[str]:
    """Adapt the weights that read the image to the network's channels; return the randomly initialised tensors."""
    here = [name for name in INPUT if name in state and name in own]
    differ = [name for name in here if patch_embed == "fresh" or state[name].shape[1] != own[name].shape[1]]
    if not differ:
        return set()
    in_file, in_network = state[differ[0]].shape[1], own[differ[0]].shape[1]
    report["patch_embed"] = f"{in_file} to {in_network} channels: {patch_embed}"
    if patch_embed == "repeat" and in_file == 1:
        state.update({name: fit_patch_embedding(state[name], in_network) for name in differ})
        return set()
    if patch_embed == "repeat":
        return set()  # the shapes differ, which is refused
    for name in differ:
        del state[name]
    return set(differ)


def _refuse(
    path: str,
    own: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    *,
    missing: Sequence[str],
    wanted: Sequence[str],
) -> None:
    """Raise `InputError` if too much is missing; warn about the little that may be missing."""
    if not missing:
        return
    total = sum(own[name].numel() for name in wanted)
    share = 1 - sum(own[name].numel() for name in missing) / total
    modules = sorted({name.split(".")[0] for name in missing})
    if share >= LEAST_SHARE:
        logger.warning("%s lacks %d tensors, which start anew: %s", path, len(missing), short_list(missing))
        return
    if not any(DECODER.match(name) for name in state):
        also = ", or as --pretrained_model of swin_unetr_pretrain" * ("rotation_head.weight" in state)
        raise InputError(
            f"{path} holds an encoder, but no decoder: {share:.0%} of the network. Use it as --pretrained_encoder{also}."
        )
    raise InputError(
        f"{path} fills {share:.1%} of the network, less than {LEAST_SHARE:.0%}: it lacks {len(missing)} tensors of "
        f"{', '.join(modules)} ({short_list(missing)}). Nothing was loaded. Use a complete file, --pretrained_encoder for "
        f'its encoder alone, or name what may start anew: --allow_partial "{[f"{module}." for module in modules]}".'
    )


def _extra(name: str) -> str | None:
    """Return the meaning of a published file's tensor that has no place in Swin UNETR; None if it is unknown."""
    return next((what for start, what in EXTRAS.items() if name.removeprefix("module.").startswith(start)), None)
