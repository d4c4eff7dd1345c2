# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write a network as a program of `torch.export` (``.pt2``), which runs without the network's Python code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ...common.errors import InputError
from ...common.files import atomic_path

logger = logging.getLogger(__name__)

LARGEST_BATCH = 1024
TOLERANCE = 1e-4  # largest difference of logits between program and network


def write_program(network: torch.nn.Module, *, path: str, channels: int, roi_size: Sequence[int]) -> Path:
    """Export a network for windows of one size and any batch size, and write it next to its weights.

    Args:
        network: the network with its weights, on the CPU.
        path: the file of its weights; the program gets its name with ``.pt2``.
        channels: channels of a window.
        roi_size: size of a window in voxels.

    Returns:
        The file. Load it with ``torch.export.load(file).module()``; it maps windows (B, C, X, Y, Z) to logits (B,
        classes, X, Y, Z).

    Raises:
        InputError: the program and the network disagree by more than `TOLERANCE` on random windows. Nothing is
            written then.
    """
    target = Path(path).with_suffix(".pt2")
    network.eval()
    windows = torch.rand(2, channels, *roi_size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        program = torch.export.export(network, (windows,), dynamic_shapes=({0: batch},))
        difference = float((program.module()(windows[:1]) - network(windows[:1])).abs().max())
    if not difference <= TOLERANCE:
        raise InputError(
            f"The exported program differs from the network by {difference:.1e} (allowed: {TOLERANCE:.0e}), so {target} is "
            "not written. Export to ONNX instead (docs/how-to/export.md), and report this with the versions of torch and monai."
        )
    with atomic_path(target) as temporary:
        torch.export.save(program, temporary)
    logger.info(
        "wrote %s: windows %s, logits within %.1e of the network's", target, " x ".join(map(str, roi_size)), difference
    )
    return target
