# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The attention blocks of each stage: stock MONAI beside the fast path, same weights, forward, and forward with backward.

    python -m benchmarks.attention                          one crop of 96^3, base size
    python -m benchmarks.attention --roi 128 128 128 --stages 1 2

A stage is MONAI's ``BasicLayer``: two Swin blocks, the second one shifted, without the merging after them. Its input has the tokens that the
stage sees when the encoder is given one crop of ``--roi`` voxels. *forward* is that of inference, without a gradient; *forward + backward* has
gradients of input and weights. On a GPU both run under autocast.

Each side is a process of its own; sides take turns (`benchmarks.side_by_side`). *limit*: the time that the arithmetic takes at the best rate
that this machine reached in a large matrix product or convolution. *GB moved*: what all operations read and write, each by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.side_by_side import write_json
from benchmarks.step_report import PRECISIONS, add_options, check_options, head, machine_floor, measure, show
from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_encoder

FAST, STOCK = SIDES = ("fast", "stock")
MODES = ("forward", "forward + backward")
STAGES = (1, 2, 3, 4)
PATCH = 2


def stage_layer(*, stage: int, feature_size: int, fast: bool) -> torch.nn.Module:
    """The blocks of a stage of the published encoder (window 7, depth 2, heads 3 to 24); random weights, equal whatever ``fast``."""
    torch.manual_seed(0)
    record = {"in_channels": 1, "feature_size": feature_size, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24]}
    record |= {"window_size": 7, "patch_size": PATCH, "merging": "monai", "use_v2": False}
    layer = getattr(build_encoder(record, fast=fast), f"layers{stage}")[0]
    layer.downsample = None
    return layer


def tokens(*, stage: int, feature_size: int, roi: Sequence[int], batch: int) -> torch.Tensor:
    """Input of a stage, (B, C, X, Y, Z)."""
    shape = [size // (PATCH * 2 ** (stage - 1)) for size in roi]
    generator = torch.Generator().manual_seed(stage)
    return torch.randn(batch, feature_size * 2 ** (stage - 1), *shape, generator=generator)


def stage_side(
    *, fast: bool, mode: str, stage: int, feature_size: int, roi: Sequence[int], batch: int, device: str, precision: str
) -> Callable[[], float]:
    """What is timed: one pass through the blocks of a stage; returns the sum of its output, or of the input's gradient."""
    layer = stage_layer(stage=stage, feature_size=feature_size, fast=fast).to(device)
    x = tokens(stage=stage, feature_size=feature_size, roi=roi, batch=batch).to(device)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    autocast = torch.autocast(device, dtype=PRECISIONS[precision], enabled=precision != "fp32")

    def forward() -> torch.Tensor:
        with torch.no_grad(), autocast:
            return layer(x).double().square().mean()

    def forward_and_backward() -> torch.Tensor:
        layer.zero_grad(set_to_none=True)
        start = x.detach().requires_grad_()
        with autocast:
            loss = (layer(start).float() * target).mean()
        loss.backward()
        return start.grad.double().square().mean()

    layer.train(mode != MODES[0])
    timed = forward if mode == MODES[0] else forward_and_backward
    return lambda: float(timed())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description="The attention blocks of each stage of Swin UNETR: stock MONAI beside the fast path.",
    )
    gpu = torch.cuda.is_available()
    add_options(parser, roi=[96, 96, 96], runs=20 if gpu else 3, batch=4 if gpu else 1)
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=STAGES, help="only these")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="only these")
    given = parser.parse_args(arguments)
    try:
        check_options(given)
        results = run(given)
    except InputError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    if given.json:
        write_json(given.json, results)
    return 0


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the numbers: ``cases`` holds one comparison for each stage and mode."""
    best = machine_floor(given)
    results: dict[str, Any] = head(given, best) | {"cases": []}
    common = {name: getattr(given, name) for name in ("feature_size", "roi", "batch", "device", "precision")}
    for stage in given.stages:
        shape = " x ".join(map(str, tokens(stage=stage, feature_size=12, roi=given.roi, batch=1).shape[2:]))
        for mode in given.modes:
            sides = {side: partial(stage_side, fast=side == FAST, mode=mode, stage=stage, **common) for side in SIDES}
            case = measure(sides, reference=STOCK, given=given, best=best)
            show(case, title=f"stage {stage}, {shape} tokens, {mode}")
            results["cases"].append({"stage": stage, "mode": mode, **case})
    return results


if __name__ == "__main__":
    sys.exit(main())
