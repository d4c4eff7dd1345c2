# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read Swin UNETR weights of any origin: find the tensors in their wrapping, and give them the names that MONAI's `SwinUNETR` uses.

The dialects in use (traps.md 3) differ in what the state dict is wrapped in, in prefixes (``module.``, ``swin_vit.``, ``encoder.``,
``student.backbone.`` ...), and in the names of the MLP's layers. All of them hold one tensor per encoder whose name ends in
``patch_embed.proj.weight``: what stands before is the prefix, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint_file import load_checkpoint_file
from .input_error import InputError

ENCODER = "swinViT."
ANCHOR = "patch_embed.proj.weight"
WRAPPINGS = ("state_dict", "model_state_dict", "model", "network", "net")
# Names of the encoder's tensors without a prefix; what else stands beside bare names (heads, decoders) is no encoder's.
ENCODER_NAMES = re.compile(r"(patch_embed|pos_drop|layers[1-4]c?)\.")
ENCODER_PREFIXES = ("swinViT.", "swin_vit.", "swinvit.", "backbone.", "encoder.")


@dataclass(frozen=True)
class FoundWeights:
    """Tensors of a checkpoint file under MONAI's names.

    Attributes:
        path: the file.
        encoder: tensors of the Swin encoder, ``swinViT.`` first.
        rest: all others (decoder, heads), without the prefix that the whole network had.
        dialect: what was recognised on the way, in words.
        content: the file's entries beside the weights, such as ``encoder``, ``labels``, ``trained``.
    """

    path: str
    encoder: dict[str, torch.Tensor]
    rest: dict[str, torch.Tensor]
    dialect: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def is_segmentation(self) -> bool:
        """Whether the file holds a whole `SwinUNETR`."""
        return "out.conv.conv.weight" in self.rest


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and any(isinstance(value, torch.Tensor) for value in content.values())
        and all(isinstance(key, str) for key in content)
    )


def _unwrap(content: Any, path: str) -> tuple[dict[str, torch.Tensor], list[str], dict[str, Any]]:
    """The state dict, what it was wrapped in, and the entries beside it."""
    dialect: list[str] = []
    beside: dict[str, Any] = {}
    while inside := [
        name for name in WRAPPINGS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)
    ]:
        dialect.append(f"in '{inside[0]}'")
        beside = {key: value for key, value in content.items() if key != inside[0]} | beside
        content = content[inside[0]]
    if not _is_state_dict(content):
        held = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"{path} holds no state dict that is known: looked for tensors at the top and in {', '.join(WRAPPINGS)}, found {held or 'nothing'}. "
            "Save it as {'state_dict': network.state_dict()}."
        )
    state = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    return state, dialect, beside


def _prefix(state: Mapping[str, torch.Tensor], path: str, asked: str | None) -> str:
    """What stands before the encoder's names."""
    prefixes = sorted(name.removesuffix(ANCHOR) for name in state if name == ANCHOR or name.endswith("." + ANCHOR))
    if not prefixes:
        raise InputError(
            f"{path} has no tensor {ANCHOR!r} under any prefix: no Swin encoder of MONAI's. It holds {len(state)} tensors, such as {', '.join(list(state)[:4])}."
        )
    if asked is not None:
        if asked not in prefixes:
            raise InputError(
                f"--weights_prefix: {path} has no encoder under the prefix {asked!r}; its prefixes: {', '.join(map(repr, prefixes))}."
            )
        return asked
    if len(prefixes) > 1:
        raise InputError(
            f"{path} holds {len(prefixes)} encoders, under {', '.join(map(repr, prefixes))} (a teacher and a student?). Take one out by configs/convert.yaml of swin_unetr_pretrain, with --weights_prefix."
        )
    return prefixes[0]


def find_weights(path: str, *, prefix: str | None = None) -> FoundWeights:
    """Open a checkpoint file and name its tensors as MONAI's `SwinUNETR` does.

    Args:
        path: ``.pt``, ``.pth`` or ``.safetensors`` file.
        prefix: of the encoder's names, where the file holds several encoders.

    Raises:
        InputError: if the file cannot be opened safely (see `load_checkpoint_file`), or holds no Swin encoder, or several.
    """
    state, dialect, beside = _unwrap(load_checkpoint_file(path), path)
    prefix = _prefix(state, path, prefix)
    # module.swinViT. is module. of the network, then its encoder; a bare module. is the encoder's alone
    outer = next((prefix.removesuffix(name) for name in ENCODER_PREFIXES if prefix.endswith(name)), prefix)
    if prefix not in ("", ENCODER):
        dialect.append(f"prefix '{prefix}'")
    if any(re.search(r"\.mlp\.fc[12]\.", name) for name in state):
        dialect.append("mlp.fc1/fc2")
    encoder, rest = {}, {}
    for name, tensor in state.items():
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and ENCODER_NAMES.match(bare):
            encoder[ENCODER + re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", bare)] = tensor
        else:
            rest[name.removeprefix(outer)] = tensor
    return FoundWeights(path, encoder, rest, tuple(dialect), beside)


def describe_encoder(found: FoundWeights, *, otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the encoder record off names and shapes; only ``merging``, which leaves no trace in them, is missing.

    Args:
        found: the weights.
        otherwise: ``depths`` and ``num_heads`` of stages that the file has not, where it may lack some; None: it must have all four.

    Raises:
        InputError: if tensors that say it are missing.
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
                f"{found.path}: its encoder has no layers{stage}.0.blocks.0.attn.relative_position_bias_table of a 3D Swin: it is incomplete or of another kind."
            )
        depths.append(max(blocks) + 1)
        heads.append(table.shape[1])
        windows.add((round(table.shape[0] ** (1 / 3)) + 1) // 2)
        if (2 * max(windows) - 1) ** 3 != table.shape[0]:
            raise InputError(f"{found.path}: a bias table of {table.shape[0]} rows belongs to no cubic window.")
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
    """Names of the released ``model_swinvit.pt``, as ``SwinUNETR.load_from`` reads them: ``module.layers1.0.blocks.0.mlp.fc1.weight``."""
    return {
        "module." + re.sub(r"\.mlp\.linear([12])\.", r".mlp.fc\1.", name.removeprefix(ENCODER)): tensor
        for name, tensor in encoder.items()
    }
