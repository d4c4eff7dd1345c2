# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compare one pre-training step: the bundle against the released procedure.

    python -m benchmarks.pretrain_step                      minutes on a CPU: base size, two crops of 64^3
    python -m benchmarks.pretrain_step --roi 96 96 96 --batch 4 --device cuda

Crops and initial weights are the same on all sides (they take turns, each in its own process; see
`benchmarks.side_by_side`):

- *ours*: engine, views, network, loss, optimiser and gradient guard of swin_unetr_pretrain's train.yaml, preset
  ``official``.
- *ours, stock network*: the same with ``--fast false``, to show the gain without the fast network.
- *official*: the released procedure, reimplemented here on the stock network: rotations and masks drawn on the host
  and applied crop by crop, two forwards, the released contrastive loss, ``.item()`` twice per step, AdamW in PyTorch's
  default implementation.
- *official, anomaly detection*: the same under ``torch.autograd.set_detect_anomaly(True)``, which the released code
  always enables. Ratios are relative to the side without it.

Crops are random numbers in [0, 1] in memory (for loading see `benchmarks.data`). On a GPU all sides run under the same
autocast. A timed run makes ``--steps`` steps. *limit*: the time that the arithmetic of a run would take at the best
rate that this machine reached in a large matrix product or convolution. *GB moved*: the bytes that all operations read
and write, counted per operation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.bundle_training import engine_steps, training_config
from benchmarks.side_by_side import write_json
from benchmarks.step_report import PRECISIONS, add_options, check_options, head, machine_floor, measure, show
from bundles.common.errors import InputError

OURS, STOCK, OFFICIAL, ANOMALY = SIDES = ("ours", "ours, stock network", "official", "official, anomaly detection")
DEFAULT_SIDES = (OURS, OFFICIAL, ANOMALY)
PLANE = (2, 3)  # axes of a crop (C, X, Y, Z) that span the plane of rotation in the released code
MOST_MASKED = 0.3  # fraction of the crop, per pass of masking
LARGEST_BLOCK, SMALLEST_BLOCK = 0.25, 0.05  # fraction of the crop's side
TEMPERATURE = 0.5


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


def make_crops(job: Job) -> torch.Tensor:
    """Return random crops for one step, (B, 1, X, Y, Z) in [0, 1]."""
    return torch.rand(job.batch, 1, *job.roi, generator=torch.Generator().manual_seed(0))


def bundle_config(job: Job, *, fast: bool = True, **further: Any) -> Any:
    """Load the bundle's config with the options of the job, and further ones."""
    options: dict[str, Any] = {"preset": "official", "feature_size": job.feature_size, "roi_size": list(job.roi)}
    options |= {"max_steps": job.steps, "val_interval": job.steps, "warmup_steps": 0, "log_every": 20}
    options |= {"device": torch.device(job.device), "amp": job.precision != "fp32"}
    options["amp_type"] = job.precision if options["amp"] else "auto"
    if job.batch == 1:
        options["mask_fill"] = ["noise"]  # no other crop to take voxels from, nor in the released code
    return training_config("swin_unetr_pretrain", fast=fast, **options, **further)


def make_network(job: Job, *, fast: bool) -> torch.nn.Module:
    """Build the bundle's network on its device; the random weights do not depend on ``fast``."""
    torch.manual_seed(0)
    return bundle_config(job, fast=fast).get_parsed_content("network").train()


# ---- the sides -----------------------------------------------------------------------------------------------------


def bundle_side(job: Job, *, fast: bool, **options: Any) -> Callable[[], float]:
    """Return a function that runs the steps with the bundle's engine and returns the last loss; with further options."""
    torch.manual_seed(0)
    trainer = bundle_config(job, fast=fast, **options).get_parsed_content("train::trainer")
    crops = make_crops(job)
    if job.device == "cuda":
        crops = crops.pin_memory()
    batches = [{"image": crops, "draw": torch.full((job.batch,), step)} for step in range(job.steps)]
    return engine_steps(trainer, batches)


class OfficialProcedure:
    """A training step of the released code, reimplemented from its description (views, losses, order of operations).

    Args:
        network: maps one view to the outputs of the three heads (`SwinPretrainer`, stock).
        device: ``cpu`` or ``cuda``.
        precision: precision of the autocast.
        seed: seed of the random draws, made on the host.
    """

    def __init__(self, network: torch.nn.Module, *, device: str, precision: str = "fp32", seed: int = 0) -> None:
        self.network = network
        self.device = device
        self.random = np.random.default_rng(seed)
        self.autocast = torch.autocast(device, dtype=PRECISIONS[precision], enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=4e-4, weight_decay=0.1)

    def rotated(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate each crop by a random number of quarter turns; return the crops and these numbers."""
        turned = crops.detach().clone()
        turns = torch.zeros(len(crops), dtype=torch.long, device=crops.device)
        for i in range(len(crops)):
            quarters = int(self.random.integers(4))
            turned[i] = crops[i].rot90(quarters, PLANE)
            turns[i] = quarters
        return turned, turns

    def masked(self, crops: torch.Tensor) -> torch.Tensor:
        """Mask every crop with blocks of noise, then with blocks of another crop of the batch."""
        masked = crops.detach().clone()
        for i in range(len(crops)):
            self._hide(masked[i], None)
            other = int(self.random.integers(len(crops)))
            if other != i:
                self._hide(masked[i], masked[other])
        return masked

    def _hide(self, crop: torch.Tensor, source: torch.Tensor | None) -> None:
        """Fill blocks, one after the other, until their volumes add up to a random share of the crop."""
        shape = crop.shape[1:]
        voxels = self.random.uniform(0, MOST_MASKED) * float(np.prod(shape))
        filled = 0
        while filled < voxels:
            box = []
            for side in shape:
                least = max(1, int(SMALLEST_BLOCK * side))
                start = int(self.random.integers(0, side - least + 1))
                size = int(self.random.integers(least, max(least, int(LARGEST_BLOCK * side)) + 1))
                box.append(slice(start, min(start + size, side)))
            block = (slice(None), *box)
            if source is None:
                noise = torch.empty(crop[block].shape, dtype=crop.dtype, device=crop.device).normal_()
                crop[block] = (noise - torch.min(noise)) / (torch.max(noise) - torch.min(noise))
            else:
                crop[block] = source[block]
            filled += int(np.prod([each.stop - each.start for each in box]))

    def contrast(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Compute NT-Xent as released: exponentials of all cosine similarities, summed without an embedding's own."""
        number = len(first)
        z = torch.cat([F.normalize(first, dim=1), F.normalize(second, dim=1)])
        similarity = F.cosine_similarity(z[:, None], z[None], dim=2)
        partners = torch.cat([torch.diag(similarity, number), torch.diag(similarity, -number)])
        others = (~torch.eye(2 * number, dtype=torch.bool, device=z.device)).float()
        sums = (others * torch.exp(similarity / TEMPERATURE)).sum(dim=1)
        return -torch.log(torch.exp(partners / TEMPERATURE) / sums).sum() / (2 * number)

    def loss(
        self, views: Sequence[torch.Tensor], crops: Sequence[torch.Tensor], turns: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the total loss and its inpainting part, with one forward per view.

        Args:
            views: the two masked views of a batch of crops.
            crops: the same two views without masks.
            turns: quarter turns of each view.
        """
        with self.autocast:
            first, second = self.network(views[0]), self.network(views[1])
            rotation = F.cross_entropy(torch.cat([first["rotation"], second["rotation"]]), torch.cat(list(turns)))
            contrast = self.contrast(first["contrast"], second["contrast"])
            painted = torch.cat([first["inpainting"], second["inpainting"]])
            inpainting = F.l1_loss(painted, torch.cat(list(crops)))
            return rotation + contrast + inpainting, inpainting

    def step(self, crops: torch.Tensor) -> float:
        """Make one step on crops in host memory; return its loss."""
        crops = crops.to(self.device)
        (first, first_turns), (second, second_turns) = self.rotated(crops), self.rotated(crops)
        views = self.masked(first), self.masked(second)
        loss, inpainting = self.loss(views, (first, second), (first_turns, second_turns))
        value = loss.item()
        inpainting.item()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return value


def official_side(job: Job, *, anomaly: bool) -> Callable[[], float]:
    """Return a function that runs the steps with the released procedure and returns the last loss."""
    torch.autograd.set_detect_anomaly(anomaly)
    network = make_network(job, fast=False)
    procedure = OfficialProcedure(network, device=job.device, precision=job.precision)
    crops = make_crops(job)
    return lambda: [procedure.step(crops) for _ in range(job.steps)][-1]


# ---- the command ---------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    fields = {name: getattr(given, name) for name in ("feature_size", "batch", "steps", "device", "precision")}
    job = Job(roi=tuple(given.roi), **fields)
    sides = {
        OURS: partial(bundle_side, job, fast=True),
        STOCK: partial(bundle_side, job, fast=False),
        OFFICIAL: partial(official_side, job, anomaly=False),
        ANOMALY: partial(official_side, job, anomaly=True),
    }
    sides = {name: side for name, side in sides.items() if name in given.sides}
    best = machine_floor(given)
    results = head(given, best)
    reference = OFFICIAL if OFFICIAL in sides else list(sides)[-1]
    results |= measure(sides, reference=reference, given=given, best=best, same_work={ANOMALY: OFFICIAL})
    crops = f"{given.batch} crop{'s' * (given.batch > 1)} of {' x '.join(map(str, given.roi))}"
    steps = f"{given.steps} step{'s' * (given.steps > 1)} per run"
    show(results, title=f"pre-training, feature size {given.feature_size}, {crops}, {steps}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and print its table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain_step",
        description="Compare one pre-training step: the bundle against the released procedure.",
    )
    gpu = torch.cuda.is_available()
    side, batch, runs, steps = (96, 4, 10, 5) if gpu else (64, 2, 3, 1)
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
