# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare the attention blocks of each stage: stock MONAI against the fast path, with the same weights.

    python -m benchmarks.attention                          one crop of 96^3, base size
    python -m benchmarks.attention --roi 128 128 128 --stages 1 2

A stage is MONAI's ``BasicLayer`` without the patch merging at its end: two Swin blocks, the second one shifted. Its
input has as many tokens as the stage receives when the encoder processes a crop of ``--roi`` voxels. *forward* runs as
in inference, without gradients. *forward + backward* computes the gradients of input and weights. On a GPU both run
under autocast.

Each side runs in its own process and the sides take turns (`benchmarks.side_by_side`). *limit*: the time that the
arithmetic would take at the best rate that this machine reached in a large matrix product or convolution. *GB moved*:
the bytes that all operations read and write, counted per operation.
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
    """Return the blocks of one stage of the published encoder (window 7, depth 2, heads 3 to 24).

    The weights are random and do not depend on ``fast``.
    """
    torch.manual_seed(0)
    record = {"in_channels": 1, "feature_size": feature_size, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24]}
    record |= {"window_size": 7, "patch_size": PATCH, "merging": "monai", "use_v2": False}
    layer = getattr(build_encoder(record, fast=fast), f"layers{stage}")[0]
    layer.downsample = None
    return layer


def tokens(*, stage: int, feature_size: int, roi: Sequence[int], batch: int) -> torch.Tensor:
    """Return the random input of a stage, (B, C, X, Y, Z)."""
    shape = [size // (PATCH * 2 ** (stage - 1)) for size in roi]
    generator = torch.Generator().manual_seed(stage)
    return torch.randn(batch, feature_size * 2 ** (stage - 1), *shape, generator=generator)


def stage_side(
    *, fast: bool, mode: str, stage: int, feature_size: int, roi: Sequence[int], batch: int, device: str, precision: str
) -> Callable[[], float]:
    """Build the function to time: one pass through the blocks of a stage.

    It returns the mean square of the output (forward) or of the input's gradient (forward + backward).
    """
    layer = stage_layer(stage=stage, feature_size=feature_size, fast=fast).to(device)
    x = tokens(stage=stage, feature_size=feature_size, roi=roi, batch=batch).to(device)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    autocast = torch.autocast(device, dtype=PRECISIONS[precision], enabled=precision != "fp32")

    def forward() -> torch.Tensor:
        with torch.no_grad(), autocast:
            return layer(x).double().square().mean()

    def forward_and_backward() -> torch.Tensor:
        layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        with autocast:
            loss = (layer(leaf).float() * target).mean()
        loss.backward()
        return leaf.grad.double().square().mean()

    layer.train(mode != MODES[0])
    timed = forward if mode == MODES[0] else forward_and_backward
    return lambda: float(timed())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its tables; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description="Compare the attention blocks of each Swin UNETR stage: stock MONAI against the fast path.",
    )
    gpu = torch.cuda.is_available()
    add_options(parser, roi=[96, 96, 96], runs=20 if gpu else 3, batch=4 if gpu else 1)
    parser.add_argument(
        "--stages", type=int, nargs="+", choices=STAGES, default=STAGES, help="stages to run (default: all)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="modes to run (default: both)")
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
    """Measure and print; return the numbers. ``cases`` holds one comparison per stage and mode."""
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
