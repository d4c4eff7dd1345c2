# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The runs of the curve: engine, network, loss, optimiser and augmentation of the bundles, data resident on the device.

Each function runs in a process of its own, at the same time as others on the same GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader
from monai.inferers import sliding_window_inference
from torch.nn import functional as F

from benchmarks.bundle_training import engine_steps, training_config
from bundles.common.data.seeded_crops import Draws, DrawSampler
from bundles.common.weights.loading import encoder_state
from bundles.pretraining.crops.hu_window import intensities
from bundles.pretraining.crops.resident_crops import ResidentCrops
from bundles.pretraining.crops.stored_crops import StoredCrops
from bundles.segmentation.training.loss import balanced_weights

from .curve_data import Pack, pack_patient, read_pack

OVERLAP = 0.25  # overlap of the windows in scoring, as in the preset cpu


@dataclass(frozen=True)
class Recipe:
    """Options of all runs. What is not named is as in the bundles' preset ``cpu``, which was chosen for such scans.

    Attributes:
        folder: folder of the pack.
        device: ``cuda`` or ``cpu``.
        network: options of the encoder.
        batch: crops per fine-tuning step; volumes, of two crops each, per pre-training step.
        pretraining_steps: steps of a pre-training.
        finetuning: further options of the fine-tuning.
    """

    folder: Path
    device: str
    network: Mapping[str, Any]
    batch: int
    pretraining_steps: int
    finetuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def common(self) -> dict[str, Any]:
        """Return the options that both trainings share."""
        gpu = self.device == "cuda"
        return {"preset": "cpu", **self.network, "device": torch.device(self.device), "amp": gpu, "log_every": 20}


@cache
def pack_of(folder: Path, device: str) -> Pack:
    """Return a pack, read once in each process."""
    return read_pack(folder, device)


def pack(folder: Path, contents: Mapping[str, Any], source: Any) -> None:
    """See `curve_data.pack_patient`."""
    torch.set_num_threads(1)
    pack_patient(folder, contents, source)


def pretrain(recipe: Recipe, seed: int, file: Path) -> dict[str, Any]:
    """Pre-train an encoder on the unlabelled scans and write it like ``encoder.pt``.

    Returns:
        Steps, seconds, last loss, peak memory of the GPU in bytes.
    """
    begin = _start(recipe, seed)
    data = pack_of(recipe.folder, recipe.device)
    steps = recipe.pretraining_steps
    options = {"max_steps": steps, "val_interval": steps, "warmup_steps": max(1, steps // 4), "data": "store"}
    options |= {"seed": seed, "roi_size": data.row["roi_size"], "spacing": data.row["spacing"]}
    parser = training_config("swin_unetr_pretrain", **recipe.common, **options)
    trainer = parser.get_parsed_content("train::trainer")
    files = [{"image": str(recipe.folder / f"{name}.b2nd")} for name in data.sections["unlabelled"]]
    stored = StoredCrops(
        data=files, cropping=parser.get_parsed_content("cropping"), hu_window=[-1000.0, 1000.0], seed=seed
    )
    sampler = DrawSampler(iterations=steps, batch_size=recipe.batch)
    crops = ResidentCrops(stored, device=recipe.device)
    loss = engine_steps(trainer, DataLoader(crops, sampler=sampler, batch_size=recipe.batch))()
    network = parser.get_parsed_content("network_def")
    content = {"state_dict": encoder_state(network), "encoder": dict(parser.get_parsed_content("encoder"))}
    torch.save(content | {"trained": {"steps": steps}}, file)
    return {"steps": steps, "loss": loss, **_spent(recipe, begin)}


def finetune(recipe: Recipe, *, n: int, seed: int, steps: int, encoder: Path | None) -> dict[str, Any]:
    """Fine-tune on ``n`` patients and score the tuning and the validation patients.

    Args:
        recipe: options of all runs.
        n, seed: number of labelled patients, and the seed that draws them: fewer are a part of more.
        steps: length of the training, with a learning-rate schedule of that length.
        encoder: file of a pre-trained encoder; None: from scratch.

    Returns:
        ``tuning`` and ``validation``: Dice, (patients, organs), None where a label lacks the organ; loss, seconds, peak
        memory.
    """
    begin = _start(recipe, seed)
    data = pack_of(recipe.folder, recipe.device)
    order = np.random.RandomState([seed, 1]).permutation(len(data.sections["training"]))
    names = [data.sections["training"][i] for i in order[:n]]
    options = {"max_steps": steps, "val_interval": steps, "warmup_steps": max(1, steps // 6), "seed": seed}
    options |= {"roi_size": data.row["roi_size"], "labels": dict(data.row["labels"])}
    options |= {"pretrained_encoder": None if encoder is None else str(encoder), **recipe.finetuning}
    if encoder is not None:  # its record says them
        options |= dict.fromkeys(recipe.network)
    parser = training_config("swin_unetr_btcv_seg", **{**recipe.common, **options})
    balance, background = (parser.get_parsed_content(name) for name in ("class_balance", "background_weight"))
    volumes = np.array([sum(len(data.voxels[name].get(c, ())) for name in names) for c in range(data.classes)])
    parser.config["loss"]["class_weights"] = balanced_weights(volumes, balance=balance, background=background)
    trainer = parser.get_parsed_content("train::trainer")
    parser.get_parsed_content("start_weights")
    loss = engine_steps(trainer, Crops(data, names, seed=seed, steps=steps, batch=recipe.batch))()
    network = parser.get_parsed_content("network_def").eval()
    scores = {part: scores_of(network, data, data.sections[part], recipe) for part in ("tuning", "validation")}
    return {**scores, "loss": loss, "names": names, **_spent(recipe, begin)}


class Crops(Sequence):
    """Batches of crops, cut on the device, that depend only on the seed and the number of the draw.

    As ``--crop_sampling classes``: a class that the patient has, each equally often, and a voxel of it as the centre.
    """

    def __init__(self, data: Pack, names: Sequence[str], *, seed: int, steps: int, batch: int) -> None:
        self.data, self.names, self.seed, self.steps, self.batch = data, names, seed, steps, batch
        self.draws = Draws(volumes=len(names), seed=seed, shuffle=True)

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        draws = range(step * self.batch, (step + 1) * self.batch)
        images, labels = zip(*map(self.crop, draws), strict=True)
        window = self.data.row["hu_window"]
        batch = {"image": intensities(torch.stack(images), window), "label": torch.stack(labels).float()}
        return batch | {"draw": torch.tensor(list(draws))}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[step] for step in range(self.steps))

    def crop(self, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image in HU and label of a draw, (1, *roi) each."""
        name = self.names[self.draws.volume_of(draw)]
        random = np.random.default_rng([self.seed, draw])
        voxels = self.data.voxels[name]
        foreground = [value for value in voxels if value] or [0]
        indices = voxels[foreground[random.integers(len(foreground))]]
        image, label = self.data.images[name], self.data.labels[name]
        shape, roi = tuple(image.shape[1:]), self.data.row["roi_size"]
        centre = np.unravel_index(indices[random.integers(len(indices))], shape)
        box, margins = [slice(None)], []
        for middle, size, side in zip(centre, shape, roi, strict=True):
            first = int(np.clip(middle - side // 2, 0, max(0, size - side)))
            box.append(slice(first, first + side))
            margins = [0, max(0, side - size), *margins]
        image, label = image[tuple(box)], label[tuple(box)]
        if any(margins):
            image, label = F.pad(image, margins, value=-1024), F.pad(label, margins)
        return image, label


def scores_of(network: torch.nn.Module, data: Pack, names: Sequence[str], recipe: Recipe) -> list[list[float | None]]:
    """Return the Dice of each patient and organ on the pack's grid; None where the label lacks the organ."""
    amp = torch.autocast(recipe.device, enabled=recipe.device == "cuda", dtype=torch.bfloat16)
    tables = []
    with torch.inference_mode(), amp:
        for name in names:
            image = intensities(data.images[name][None], data.row["hu_window"])
            logits = sliding_window_inference(image, data.row["roi_size"], 8, network, overlap=OVERLAP, mode="gaussian")
            tables.append(confusion(logits.argmax(dim=1), data.labels[name], data.classes))
    return [dice_of(table.cpu().numpy()) for table in tables]


def confusion(found: torch.Tensor, true: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the number of voxels of each found class (rows) and true class (columns)."""
    return torch.bincount((found.long() * classes + true.long()).flatten(), minlength=classes**2).view(classes, classes)


def dice_of(table: np.ndarray) -> list[float | None]:
    """Return the Dice of each class except the background from a `confusion`; None where no voxel has the class."""
    true, found, both = table.sum(axis=0), table.sum(axis=1), np.diag(table)
    return [float(2 * both[c] / (true[c] + found[c])) if true[c] else None for c in range(1, len(table))]


def _start(recipe: Recipe, seed: int) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if recipe.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return time.monotonic()


def _spent(recipe: Recipe, begin: float) -> dict[str, float | int]:
    peak = torch.cuda.max_memory_allocated() if recipe.device == "cuda" else 0
    return {"seconds": round(time.monotonic() - begin, 1), "peak": peak}


def is_finite(result: Mapping[str, Any]) -> bool:
    """Return whether the last loss of a run is a number."""
    return math.isfinite(result["loss"])
