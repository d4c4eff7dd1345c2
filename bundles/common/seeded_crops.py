# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Training crops whose content depends on the seed and the number of the draw alone.

Draw ``i`` decides which volume is read and every random transform of it. So the same seed gives the same crops whatever the
number of workers, a resumed run continues with the draws that the unbroken run would have made, and the ranks of a
distributed run share the draws out among themselves without a sampler that has to be told the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose
from torch.utils.data import Dataset, Sampler

from .distributed import rank, world_size


def _plain(crop: dict[str, Any]) -> dict[str, Any]:
    """Tensors without metadata: they train faster, and torch.compile does not recompile for them (traps.md 20)."""
    return {
        k: v.as_tensor() if isinstance(v, MetaTensor) else v for k, v in crop.items() if not k.endswith("_transforms")
    }


class SeededCrops(Dataset):
    """Map-style dataset over draws: ``dataset[i]`` is a list of crops (dicts) of the volume that draw ``i`` chose.

    The volumes are visited in a new random order in every pass over the data. Each crop carries ``"draw"``, so that later
    steps (masks, rotations) can seed themselves by it.

    Args:
        data: items of the data list.
        preprocessing: deterministic transforms, whose result is cached.
        augmentation: random transforms, crops among them; runs anew for each draw.
        seed: seed of the run.
        cache_num: how many preprocessed volumes to keep in memory.
        shuffle: False visits volume ``i`` at draw ``i``, for validation on crops that are the same every time.
    """

    def __init__(
        self,
        *,
        data: Sequence[dict],
        preprocessing: Compose,
        augmentation: Compose,
        seed: int,
        cache_num: int,
        shuffle: bool = True,
    ) -> None:
        self.volumes = CacheDataset(data, preprocessing, cache_num=cache_num, num_workers=2, progress=len(data) > 20)
        self.augmentation = augmentation
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Number of volumes, so one pass; draws go on beyond it."""
        return len(self.volumes)

    def volume_of(self, draw: int) -> int:
        """Index of the volume that a draw reads."""
        number = len(self.volumes)
        if not self.shuffle:
            return draw % number
        order = np.random.default_rng([self.seed, draw // number]).permutation(number)
        return int(order[draw % number])

    def __getitem__(self, draw: int) -> list[dict[str, Any]]:
        seed = int(np.random.SeedSequence([self.seed, draw]).generate_state(1)[0])
        self.augmentation.set_random_state(seed=seed)
        crops = self.augmentation(self.volumes[self.volume_of(draw)])
        return [{**_plain(crop), "draw": draw} for crop in (crops if isinstance(crops, list) else [crops])]


class DrawSampler(Sampler[int]):
    """The draws of this rank, from step ``first_step`` to the last: step s takes draws ``s*W*B + r*B .. +B`` (W ranks, B volumes each).

    Args:
        steps: steps of the whole run.
        batch_size: volumes per step on each rank.
    """

    def __init__(self, *, steps: int, batch_size: int) -> None:
        self.steps = steps
        self.batch_size = batch_size
        self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for step in range(self.first_step, self.steps):
            start = (step * world_size() + rank()) * self.batch_size
            yield from range(start, start + self.batch_size)
