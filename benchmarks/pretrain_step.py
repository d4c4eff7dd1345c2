# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""One step of pre-training: the bundle beside the released procedure, same crops, same weights at the start.

    python -m benchmarks.pretrain_step                      a CPU in minutes: base size, two crops of 64^3
    python -m benchmarks.pretrain_step --roi 96 96 96 --batch 4 --device cuda

Sides (in turns, each in a process of its own; see `benchmarks.side_by_side`):

- *ours*: the engine, views, network, loss, optimiser and gradient guard of swin_unetr_pretrain's train.yaml, preset ``official``.
- *ours, stock network*: the same with ``--fast false``: what the step alone brings.
- *official*: the released procedure rebuilt here on the stock network: rotations and masks drawn on the host and put in crop by crop, two
  forwards, the released contrast, ``.item()`` twice a step, AdamW as PyTorch builds it.
- *official, anomaly detection*: the same under ``torch.autograd.set_detect_anomaly(True)``, as the released code always runs. Ratios are to
  the side without it.

Crops are random numbers in [0, 1] that lie in memory (`benchmarks.data` is about loading). All sides run under the same autocast on a GPU.
A timed run makes ``--steps`` steps. *limit*: the time that the arithmetic of a run takes at the best rate that this machine reached in a
large matrix product or convolution. *GB moved*: what all operations read and write, each by itself.
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
PLANE = (2, 3)  # axes of a crop (C, X, Y, Z) in which the released code turns it
MOST_MASKED, LARGEST_BLOCK, SMALLEST_BLOCK = 0.3, 0.25, 0.05  # per pass of masking; of a side
TEMPERATURE = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all sides are given.

    Attributes:
        feature_size: of the encoder; depths, heads and window are the published ones.
        roi: voxels of a crop.
        batch: crops per step.
        steps: per timed run.
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
    """Crops of one step, (B, 1, X, Y, Z) in [0, 1]."""
    return torch.rand(job.batch, 1, *job.roi, generator=torch.Generator().manual_seed(0))


def bundle_config(job: Job, *, fast: bool = True) -> Any:
    """The bundle's config with the options of the job."""
    options: dict[str, Any] = {"preset": "official", "feature_size": job.feature_size, "roi_size": list(job.roi)}
    options |= {"max_steps": job.steps, "val_interval": job.steps, "warmup_steps": 0, "log_every": 20}
    options |= {"device": torch.device(job.device), "amp": job.precision != "fp32"}
    options["amp_type"] = job.precision if options["amp"] else "auto"
    if job.batch == 1:
        options["mask_fill"] = ["noise"]  # there is no other crop to take voxels from, in the released code neither
    return training_config("swin_unetr_pretrain", fast=fast, **options)


def make_network(job: Job, *, fast: bool) -> torch.nn.Module:
    """The bundle's network on its device, with random weights that do not depend on ``fast``."""
    torch.manual_seed(0)
    return bundle_config(job, fast=fast).get_parsed_content("network").train()


# ---- the sides -----------------------------------------------------------------------------------------------------


def bundle_side(job: Job, *, fast: bool) -> Callable[[], float]:
    """Steps of the bundle's engine; returns the last loss."""
    torch.manual_seed(0)
    trainer = bundle_config(job, fast=fast).get_parsed_content("train::trainer")
    crops = make_crops(job)
    if job.device == "cuda":
        crops = crops.pin_memory()
    batches = [{"image": crops, "draw": torch.full((job.batch,), step)} for step in range(job.steps)]
    return engine_steps(trainer, batches)


class OfficialProcedure:
    """A step as the released code makes it, written anew from its description (views, losses, order of operations).

    Args:
        network: gives the three heads' outputs of one view (`SwinPretrainer`, stock).
        device: ``cpu`` or ``cuda``.
        precision: of the autocast.
        seed: of the draws, which come from the host.
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
        """Each crop turned by quarters of its own, and how many."""
        turned = crops.detach().clone()
        turns = torch.zeros(len(crops), dtype=torch.long, device=crops.device)
        for i in range(len(crops)):
            quarters = int(self.random.integers(4))
            turned[i] = crops[i].rot90(quarters, PLANE)
            turns[i] = quarters
        return turned, turns

    def masked(self, crops: torch.Tensor) -> torch.Tensor:
        """Blocks of noise in every crop, then blocks of another crop of the batch."""
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
            place = (slice(None), *box)
            if source is None:
                noise = torch.empty(crop[place].shape, dtype=crop.dtype, device=crop.device).normal_()
                crop[place] = (noise - torch.min(noise)) / (torch.max(noise) - torch.min(noise))
            else:
                crop[place] = source[place]
            filled += int(np.prod([each.stop - each.start for each in box]))

    def contrast(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The released form of NT-Xent: exponentials of all cosine similarities, an embedding's own masked out of the sum."""
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
        """The loss of both views, and of it the inpainting, from one forward each.

        Args:
            views: the two masked views of the crops of a batch.
            crops: the same, not masked.
            turns: quarter turns of each view.
        """
        with self.autocast:
            one, other = self.network(views[0]), self.network(views[1])
            rotation = F.cross_entropy(torch.cat([one["rotation"], other["rotation"]]), torch.cat(list(turns)))
            contrast = self.contrast(one["contrast"], other["contrast"])
            painted = torch.cat([one["inpainting"], other["inpainting"]])
            inpainting = F.l1_loss(painted, torch.cat(list(crops)))
            return rotation + contrast + inpainting, inpainting

    def step(self, crops: torch.Tensor) -> float:
        """One step on crops that lie on the host; returns its loss."""
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
    """Steps of the released procedure; returns the last loss."""
    torch.autograd.set_detect_anomaly(anomaly)
    network = make_network(job, fast=False)
    procedure = OfficialProcedure(network, device=job.device, precision=job.precision)
    crops = make_crops(job)
    return lambda: [procedure.step(crops) for _ in range(job.steps)][-1]


# ---- the command ---------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the numbers."""
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
    steps = f"{given.steps} step{'s' * (given.steps > 1)} a run"
    show(results, title=f"pre-training, feature size {given.feature_size}, {crops}, {steps}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain_step",
        description="One step of pre-training: the bundle beside the released procedure.",
    )
    gpu = torch.cuda.is_available()
    side, batch, runs, steps = (96, 4, 10, 5) if gpu else (64, 2, 3, 1)
    add_options(parser, roi=[side] * 3, runs=runs, batch=batch)
    parser.add_argument("--steps", type=int, default=steps, help=f"per timed run (default here: {steps})")
    names = "; ".join(SIDES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=DEFAULT_SIDES, metavar="SIDE", help=f"of: {names}")
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
