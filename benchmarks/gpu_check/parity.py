# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Part 3: the fast path computes what stock MONAI computes in float64, forward and backward, in every precision.

Rounding alone makes errors in float32, bfloat16 and float16, so the yardstick is stock MONAI at the same precision:
the fast path may have up to `MARGIN` times its error, or the `FLOOR` of the precision, but never more than `CEILING`,
even where stock MONAI is not a yardstick itself. Errors are relative 2-norms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bundles.common.networks.swin_unetr import build_encoder, build_swin_unetr

from .parts import Settings, attempt, tell

BASE = {"in_channels": 1, "feature_size": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
CPU = {**BASE, "feature_size": 12, "num_heads": [1, 2, 4, 8], "window_size": 4}  # preset cpu: 64 tokens a window
TINY = {**CPU, "depths": [2, 1, 1, 1]}
COMMON = {"patch_size": 2, "merging": "monai", "use_v2": False}
# Blocks of one stage: record, stage, tokens along each axis. The second block of a stage is shifted.
STAGES = {
    "stage 1, base (343 tokens, width 16)": (BASE, 1, (24, 24, 24)),
    "stage 3, base (343 tokens, padded)": (BASE, 3, (12, 12, 12)),
    "stage 4, base (window cut to 216 tokens)": (BASE, 4, (6, 6, 6)),
    "stage 1, preset cpu (64 tokens, width 12)": (CPU, 1, (16, 16, 8)),
    "stage 4, preset cpu (64 tokens, cut)": (CPU, 4, (4, 4, 2)),
}
TINY_STAGES = ("stage 1, preset cpu (64 tokens, width 12)", "stage 4, preset cpu (64 tokens, cut)")
NETWORKS = {"whole network, base, 96^3": (BASE, (96, 96, 96)), "whole network, preset cpu": (CPU, (64, 64, 32))}
TINY_NETWORKS = {"whole network, tiny": (TINY, (64, 64, 32))}
TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MARGIN = 2.0
CEILING = 0.5
FLOOR = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}

Errors = dict[str, float]


def run(settings: Settings) -> None:
    """Compare the attention blocks and the whole networks."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, (record, stage, grid) in STAGES.items():
        if name in TINY_STAGES or not settings.dry_run:
            shape = (2, record["feature_size"] * 2 ** (stage - 1), *grid)
            attempt(name, partial(compare, name, partial(stage_blocks, record, stage), shape, settings.device))
    for name, (record, roi) in (TINY_NETWORKS if settings.dry_run else NETWORKS).items():
        attempt(name, partial(compare, name, partial(network, record), (1, 1, *roi), settings.device))


def stage_blocks(record: dict[str, Any], stage: int, fast: bool) -> torch.nn.Module:
    """Return the Swin blocks of a stage without the patch merging at its end."""
    layer = getattr(build_encoder(record | COMMON, fast=fast), f"layers{stage}")[0]
    layer.downsample = None
    return layer


def network(record: dict[str, Any], fast: bool) -> torch.nn.Module:
    """Return Swin UNETR with 14 classes."""
    return build_swin_unetr(record | COMMON, out_channels=14, fast=fast)


def compare(name: str, build: Callable[[bool], torch.nn.Module], shape: tuple[int, ...], device: str) -> None:
    """Report the errors of the fast and the stock module in each precision against the stock module in float64."""
    torch.manual_seed(0)
    weights = build(False).state_dict()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(device)

    def results(fast: bool, precision: str) -> dict[str, Any]:
        module = build(fast)
        module.load_state_dict(weights)
        module.to(device)
        if precision == "fp64":
            return outcome(module.double(), x.double(), torch.autocast(device, enabled=False))
        kind = TYPES[precision]
        return outcome(module, x, torch.autocast(device, dtype=kind or torch.bfloat16, enabled=kind is not None))

    exact = results(False, "fp64")
    for precision in TYPES:
        if device == "cpu" and precision == "fp16":
            continue  # a CPU has no float16 convolution worth waiting for
        label = f"{name}, {precision}"

        def one(precision: str = precision, label: str = label) -> None:
            ours, stock = (errors(results(fast, precision), exact) for fast in (True, False))
            bad = [part for part in ours if not ours[part] <= tolerance(stock[part], precision)]
            shown = ", ".join(f"{part} {ours[part]:.1e} (stock {stock[part]:.1e})" for part in ours)
            verdict = f"; too far: {', '.join(bad)}" if bad else ""
            tell(label, ok=not bad, text=f"{label}: {shown}{verdict}", ours=ours, stock=stock)

        attempt(label, one)


def tolerance(stock: float, precision: str) -> float:
    """Return the largest error that the fast path may have, given that of stock MONAI (which may be NaN)."""
    return max(min(MARGIN * stock, CEILING) if stock == stock else CEILING, FLOOR[precision])


def outcome(module: torch.nn.Module, x: torch.Tensor, autocast: torch.autocast) -> dict[str, Any]:
    """Return output with and without gradients, and the gradients of input and weights of a fixed scalar."""
    module.eval()
    with torch.inference_mode(), autocast:
        inference = module(x).double()
    module.train()
    leaf = x.clone().requires_grad_()
    with autocast:
        output = module(leaf)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.device)
    # Gradients of the output of about 0.002 at base size: float16 has no digits left for those of a mean of 10^7 voxels.
    (8 * output.numel() ** -0.5 * (output.double() * target).sum()).backward()
    gradients = {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}
    return {
        "inference": inference.clone(),
        "output": output.detach().double(),
        "input gradient": leaf.grad.double(),
        "weight gradient": gradients,
    }


def errors(found: dict[str, Any], exact: dict[str, Any]) -> Errors:
    """Return the relative error of each part; of the weights' gradients over all weights together."""
    result = {part: relative([found[part]], [exact[part]]) for part in ("inference", "output", "input gradient")}
    mine, true = found["weight gradient"], exact["weight gradient"]
    if mine.keys() != true.keys():
        return result | {"weight gradient": float("nan")}
    return result | {"weight gradient": relative([mine[name] for name in true], list(true.values()))}


def relative(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return the 2-norm of the difference over the 2-norm of the exact value."""
    difference = torch.stack([(a - b).square().sum() for a, b in zip(found, exact, strict=True)]).sum()
    return float((difference / torch.stack([b.square().sum() for b in exact]).sum()).sqrt())
