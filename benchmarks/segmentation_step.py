# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare one segmentation training step: the bundle against a plain loop over MONAI's components.

    python -m benchmarks.segmentation_step                  minutes on a CPU: base size, one crop of 64^3
    python -m benchmarks.segmentation_step --roi 96 96 96 --batch 4 --device cuda

Crops and initial weights are the same on all sides (they take turns, each in its own process; see
`benchmarks.side_by_side`):

- *ours*: engine, network, loss, optimiser and gradient guard of swin_unetr_btcv_seg's train.yaml, preset ``official``.
- *ours, stock network*: the same with ``--fast false``, to show the gain without the fast network.
- *stock*: MONAI's `SwinUNETR` and `DiceCELoss`, AdamW in PyTorch's default implementation, ``.item()`` once per step.

Crops are random numbers with block-shaped labels, in memory. No side augments them: the bundle's augmentation on the
device takes little time, and a loop over MONAI's transforms augments in its workers. On a GPU all sides run under the
same autocast. A timed run makes ``--steps`` steps. *limit*: the time that the arithmetic of a run would take at the
best rate that this machine reached in a large matrix product or convolution. *GB moved*: the bytes that all operations
read and write, counted per operation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch.nn import functional as F

from benchmarks.bundle_training import engine_steps, training_config
from benchmarks.side_by_side import write_json
from benchmarks.step_report import PRECISIONS, add_options, check_options, head, machine_floor, measure, show
from bundles.common.errors import InputError

OURS, OURS_STOCK, STOCK = SIDES = ("ours", "ours, stock network", "stock")
DEFAULT_SIDES = (OURS, STOCK)
CLASSES = 14
BLOCK = 16  # side of a block of one label, in voxels


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings shared by all sides.

    Attributes:
        feature_size: feature size of the encoder; depths, heads and window are the published ones.
        roi: crop size in voxels.
        batch: crops per step.
        steps: steps per timed run.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    feature_size: int
    roi: tuple[int, int, int]
    batch: int
    steps: int
    device: str
    precision: str


def make_crops(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Make images (B, 1, X, Y, Z) in [0, 1] and label values of the same shape."""
    generator = torch.Generator().manual_seed(0)
    blocks = [size // BLOCK for size in job.roi]
    label = torch.randint(CLASSES, (job.batch, 1, *blocks), generator=generator).float()
    label = F.interpolate(label, size=job.roi)
    image = (label / CLASSES + 0.2 * torch.rand(label.shape, generator=generator)).clamp(0, 1)
    return image, label


def bundle_config(job: Job, *, fast: bool = True, **further: Any) -> Any:
    """Load the bundle's config with the options of the job, and further ones."""
    options: dict[str, Any] = {"preset": "official", "feature_size": job.feature_size, "roi_size": list(job.roi)}
    options |= {"max_steps": job.steps, "val_interval": job.steps, "warmup_steps": 0, "log_every": 20}
    options |= {"device": torch.device(job.device), "amp": job.precision != "fp32", "augmentation": {}}
    options["amp_type"] = job.precision if options["amp"] else "auto"
    return training_config("swin_unetr_btcv_seg", fast=fast, **options, **further)


def make_network(job: Job, *, fast: bool) -> torch.nn.Module:
    """Build the bundle's network on its device; without ``fast`` it is MONAI's `SwinUNETR`.

    The random weights do not depend on ``fast``.
    """
    torch.manual_seed(0)
    return bundle_config(job, fast=fast).get_parsed_content("network").train()


def bundle_side(job: Job, *, fast: bool, **options: Any) -> Callable[[], float]:
    """Return a function that runs the steps with the bundle's engine and returns the last loss; with further options."""
    torch.manual_seed(0)
    trainer = bundle_config(job, fast=fast, **options).get_parsed_content("train::trainer")
    image, label = make_crops(job)
    if job.device == "cuda":
        image, label = image.pin_memory(), label.pin_memory()
    batches = [{"image": image, "label": label, "draw": torch.full((job.batch,), step)} for step in range(job.steps)]
    return engine_steps(trainer, batches)


def stock_loss() -> torch.nn.Module:
    """Return the loss of the official BTCV code, with MONAI's smoothing."""
    return DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True)


def stock_side(job: Job) -> Callable[[], float]:
    """Return a function that runs the steps in a plain loop and returns the last loss."""
    network, loss_function = make_network(job, fast=False), stock_loss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-5)
    autocast = torch.autocast(job.device, dtype=PRECISIONS[job.precision], enabled=job.precision != "fp32")
    scaler = torch.amp.GradScaler(job.device, enabled=job.precision == "fp16")
    crops = make_crops(job)

    def step() -> float:
        image, label = (each.to(job.device) for each in crops)
        optimizer.zero_grad()
        with autocast:
            loss = loss_function(network(image), label)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return lambda: [step() for _ in range(job.steps)][-1]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    fields = {name: getattr(given, name) for name in ("feature_size", "batch", "steps", "device", "precision")}
    job = Job(roi=tuple(given.roi), **fields)
    sides = {
        OURS: partial(bundle_side, job, fast=True),
        OURS_STOCK: partial(bundle_side, job, fast=False),
        STOCK: partial(stock_side, job),
    }
    sides = {name: side for name, side in sides.items() if name in given.sides}
    best = machine_floor(given)
    results = head(given, best)
    reference = STOCK if STOCK in sides else list(sides)[-1]
    results |= measure(sides, reference=reference, given=given, best=best)
    crops = f"{given.batch} crop{'s' * (given.batch > 1)} of {' x '.join(map(str, given.roi))}"
    steps = f"{given.steps} step{'s' * (given.steps > 1)} per run"
    show(results, title=f"segmentation, feature size {given.feature_size}, {CLASSES} classes, {crops}, {steps}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation_step",
        description="Compare one segmentation training step: the bundle against a plain loop over MONAI's components.",
    )
    gpu = torch.cuda.is_available()
    side, batch, runs, steps = (96, 4, 10, 5) if gpu else (64, 1, 3, 1)
    add_options(parser, roi=[side] * 3, runs=runs, batch=batch)
    parser.add_argument("--steps", type=int, default=steps, help=f"steps per timed run (default here: {steps})")
    sides_help = f"sides to run, of: {'; '.join(SIDES)} (default: {'; '.join(DEFAULT_SIDES)})"
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=DEFAULT_SIDES, metavar="SIDE", help=sides_help)
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


if __name__ == "__main__":
    sys.exit(main())
