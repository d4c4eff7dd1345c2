# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read Swin UNETR weights from any source, and rename their tensors to the names of MONAI's `SwinUNETR`.

Published checkpoints differ in the nesting of the state dict, in prefixes (``module.``, ``swin_vit.``, ``encoder.``,
``student.backbone.`` ...), and in the names of the MLP layers. All have one tensor per encoder whose name ends in
``patch_embed.proj.weight``: the part before it is the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from .checkpoint_file import open_checkpoint

ENCODER = "swinViT."
ANCHOR = "patch_embed.proj.weight"
# Names of the encoder's tensors without prefix. If they have no prefix, this distinguishes them from heads and
# decoders.
ENCODER_NAMES = re.compile(r"(patch_embed|pos_drop|layers[1-4]c?)\.")
ENCODER_PREFIXES = ("swinViT.", "swin_vit.", "swinvit.", "backbone.", "encoder.")


@dataclass(frozen=True)
class FoundWeights:
    """Tensors of a checkpoint file under MONAI's names.

    Attributes:
        path: the file.
        encoder: tensors of the Swin encoder; the names begin with ``swinViT.``.
        rest: all other tensors (decoder, heads), without the prefix of the whole network.
        dialect: nesting, prefix and layer names that were recognised, as text.
        content: the other entries of the file, such as ``encoder``, ``labels``, ``trained``.
    """

    path: str
    encoder: dict[str, torch.Tensor]
    rest: dict[str, torch.Tensor]
    dialect: tuple[str, ...]
    content: Mapping[str, Any]


def _state_dicts(content: Any, where: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Return the mappings that contain a Swin encoder, with the keys that lead to them."""
    if not isinstance(content, Mapping) or len(where) > 3:
        return []
    if any(
        isinstance(key, str) and isinstance(value, torch.Tensor) and _is_anchor(key) for key, value in content.items()
    ):
        return [(where, content)]
    return [found for key, value in content.items() for found in _state_dicts(value, (*where, str(key)))]


def _is_anchor(name: str) -> bool:
    return name == ANCHOR or name.endswith("." + ANCHOR)


def _unwrap(content: Any, path: str) -> tuple[dict[str, torch.Tensor], list[str], dict[str, Any]]:
    """Return the state dict, a description of its nesting, and the entries next to it."""
    states = _state_dicts(content)
    if not states:
        names, inside = (list(content), content.values()) if isinstance(content, Mapping) else ([], [])
        nested = next((list(value) for value in inside if isinstance(value, Mapping) and value), [])
        found = ", ".join(map(str, names[:6] + nested[:4])) or type(content).__name__
        if "nnssl_adaptation_plan" in names:
            found += ". It is a file of nnssl, whose networks are ResEnc and Primus; its SwinUNETR is a proxy task"
        raise InputError(
            f"{path} has no tensor {ANCHOR!r} with any prefix or nesting, so it contains no Swin encoder of MONAI. Found: {found}."
        )
    if len(states) > 1:  # merge into one state dict with a prefix for each, so that the user can select one
        return (
            {
                f"{'.'.join(where)}.{k}": v
                for where, state in states
                for k, v in state.items()
                if isinstance(v, torch.Tensor)
            },
            [],
            {},
        )
    (where, state), beside = states[0], {}
    for key in where:
        beside = {str(k): v for k, v in content.items() if k != key} | beside
        content = content[key]
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}, [f"in '{key}'" for key in where], beside


def _prefix(state: Mapping[str, torch.Tensor], path: str, asked: str | None) -> str:
    """Return the prefix of the encoder's names."""
    prefixes = sorted(name.removesuffix(ANCHOR) for name in state if _is_anchor(name))
    if asked is not None:
        if asked not in prefixes:
            raise InputError(
                f"--weights_prefix: {path} has no encoder under the prefix {asked!r}; its prefixes: {', '.join(map(repr, prefixes))}."
            )
        return asked
    if len(prefixes) > 1:
        raise InputError(
            f"{path} contains {len(prefixes)} encoders, under {', '.join(map(repr, prefixes))} (teacher and student?). "
            "Extract one with configs/convert.yaml of swin_unetr_pretrain and --weights_prefix."
        )
    return prefixes[0]


def find_weights(path: str, *, prefix: str | None = None) -> FoundWeights:
    """Open a checkpoint file and rename its tensors to the names of MONAI's `SwinUNETR`.

    Args:
        path: ``.pt``, ``.pth`` or ``.safetensors`` file.
        prefix: prefix of the encoder's names, to select one of several encoders.

    Raises:
        InputError: the file cannot be opened safely (see `load_checkpoint_file`), or contains no Swin encoder, or
            several and no ``prefix`` is given.
    """
    state, dialect, beside = _unwrap(open_checkpoint(path), path)
    prefix = _prefix(state, path, prefix)
    # "module.swinViT.": the network's prefix is "module."; a bare "module." is the prefix of an encoder file
    outer = next((prefix.removesuffix(name) for name in ENCODER_PREFIXES if prefix.endswith(name)), prefix)
    if prefix not in ("", ENCODER):
        dialect.append(f"prefix '{prefix}'")
    if any(re.search(r"\.mlp\.fc[12]\.", name) for name in state):
        dialect.append("mlp.fc1/fc2")
    encoder, rest = {}, {}
    for name, tensor in state.items():
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and ENCODER_NAMES.match(bare):
            # Weights for MONAI's filter_swinunetr have one more level.
            bare = re.sub(r"^(layers[1-4]c?)\.0\.0\.", r"\1.0.", bare)
            encoder[ENCODER + re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", bare)] = tensor
        else:
            rest[name.removeprefix(outer)] = tensor
    return FoundWeights(path, encoder, rest, tuple(dialect), beside)


def describe_encoder(found: FoundWeights, *, otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Derive the encoder record from names and shapes of the tensors, except ``merging``, which they do not show.

    Args:
        found: the weights.
        otherwise: ``depths`` and ``num_heads`` to use for stages that the file lacks; None: the file must have all
            four.

    Raises:
        InputError: tensors that are needed for this are missing.
    """
    state = {name.removeprefix(ENCODER): tensor for name, tensor in found.encoder.items()}
    proj = state[ANCHOR]
    depths, heads, windows = [], [], set()
    for stage in range(1, 5):
        blocks = {int(m[1]) for name in state if (m := re.match(rf"layers{stage}\.0\.blocks\.(\d+)\.", name))}
        table = state.get(f"layers{stage}.0.blocks.0.attn.relative_position_bias_table")
        if table is None and not blocks and stage > 1 and otherwise is not None and proj.dim() == 5:
            depths.append(otherwise["depths"][stage - 1])
            heads.append(otherwise["num_heads"][stage - 1])
            continue
        if table is None or proj.dim() != 5:
            raise InputError(
                f"{found.path}: its encoder has no layers{stage}.0.blocks.0.attn.relative_position_bias_table of a 3D Swin: the file is incomplete, or the encoder is of another kind."
            )
        depths.append(max(blocks) + 1)
        heads.append(table.shape[1])
        windows.add((round(table.shape[0] ** (1 / 3)) + 1) // 2)
        if (2 * max(windows) - 1) ** 3 != table.shape[0]:
            raise InputError(f"{found.path}: a bias table of {table.shape[0]} rows does not fit any cubic window.")
    return {
        "in_channels": proj.shape[1],
        "feature_size": proj.shape[0],
        "depths": depths,
        "num_heads": heads,
        "window_size": windows.pop() if len(windows) == 1 else sorted(windows),
        "patch_size": proj.shape[2],
        "use_v2": any(re.match(r"layers[1-4]c\.", name) for name in state),
    }


def official_layout(encoder: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors as in the released ``model_swinvit.pt``, which ``SwinUNETR.load_from`` reads.

    Example: ``module.layers1.0.blocks.0.mlp.fc1.weight``.
    """
    return {
        "module." + re.sub(r"\.mlp\.linear([12])\.", r".mlp.fc\1.", name.removeprefix(ENCODER)): tensor
        for name, tensor in encoder.items()
    }
