# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Build Swin UNETR, or its encoder alone, from an encoder record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformer

from ..value_rules import SHARE_BELOW_ONE
from .fast.swin import make_fast
from .patch_merging import MERGING


def build_encoder(record: Mapping[str, Any], *, use_checkpoint: bool = False, fast: bool = True) -> SwinTransformer:
    """Build the Swin encoder alone, identical to the attribute ``swinViT`` of `SwinUNETR`.

    Args:
        record: from `resolve_encoder`.
        use_checkpoint: gradient checkpointing.
        fast: same results in less time and memory (`make_fast`); False: stock MONAI.
    """
    encoder = SwinTransformer(
        in_chans=record["in_channels"],
        embed_dim=record["feature_size"],
        window_size=[record["window_size"]] * 3,
        patch_size=[record["patch_size"]] * 3,
        depths=record["depths"],
        num_heads=record["num_heads"],
        use_checkpoint=use_checkpoint,
        downsample=MERGING[record["merging"]],
        use_v2=record["use_v2"],
    )
    return make_fast(encoder) if fast else encoder


def build_swin_unetr(
    record: Mapping[str, Any],
    *,
    out_channels: int,
    use_checkpoint: bool = False,
    drop_path: float = 0.0,
    freeze_encoder: bool = False,
    fast: bool = True,
    guard: Callable[[SwinUNETR], None] | None = None,
) -> SwinUNETR:
    """Build MONAI's Swin UNETR with the encoder of the record.

    Args:
        record: from `resolve_encoder`.
        out_channels: number of classes, including the background.
        use_checkpoint: gradient checkpointing: less activation memory for about a third more computation.
        drop_path: stochastic depth rate of the last Swin block. It grows linearly from 0 at the first block (Huang et
            al., arXiv 1603.09382).
        freeze_encoder: do not train the weights of the encoder.
        fast: same results in less time and memory (`make_fast`); False: stock MONAI.
        guard: is called with the network, to watch the weights that it is given (`MergingGuard`).

    Raises:
        InputError: ``drop_path`` is outside [0, 1).
    """
    SHARE_BELOW_ONE.check("drop_path", drop_path)
    network = SwinUNETR(
        in_channels=record["in_channels"],
        out_channels=out_channels,
        feature_size=record["feature_size"],
        depths=record["depths"],
        num_heads=record["num_heads"],
        window_size=record["window_size"],
        patch_size=record["patch_size"],
        use_checkpoint=use_checkpoint,
        dropout_path_rate=drop_path,
        downsample=MERGING[record["merging"]],
        use_v2=record["use_v2"],
    )
    network.swinViT.requires_grad_(not freeze_encoder)
    network = make_fast(network) if fast else network
    if guard is not None:
        guard(network)
    return network
