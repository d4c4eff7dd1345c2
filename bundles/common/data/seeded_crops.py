# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Training crops that depend only on the seed and on the number of the draw.

Draw ``i`` determines which volume is read and every random transform of it. So the same seed gives the same crops for
any number of workers, a resumed run continues with the draws of an uninterrupted one, and the ranks of a distributed
run share the draws without a sampler that must know the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose
from torch.utils.data import Dataset, Sampler

from ..errors import InputError
from ..run.distributed import rank, world_size
from .carried_labels import NOTES, Visits
from .partial_labels import LABELLED, shown_classes


def _plain(crop: dict[str, Any]) -> dict[str, Any]:
    """Drop the metadata of tensors: training is faster, and torch.compile does not recompile because of it."""
    return {
        k: v.as_tensor() if isinstance(v, MetaTensor) else v for k, v in crop.items() if not k.endswith("_transforms")
    }


@dataclass(frozen=True)
class Draws:
    """Volume and random seed of each draw.

    Attributes:
        volumes: number of volumes.
        seed: seed of the run.
        shuffle: visit the volumes in a new random order in every pass; False: draw ``i`` reads volume ``i``.
        visits: the volumes of a pass, if it does not visit each once; only with ``shuffle``.
    """

    volumes: int
    seed: int
    shuffle: bool
    visits: Visits | None = None

    def volume_of(self, draw: int) -> int:
        """Return the index of the volume that a draw reads."""
        if not self.shuffle:
            return draw % self.volumes
        visits = self.visits or Visits(tuple(range(self.volumes)))
        if visits.last_from is not None and draw >= visits.last_from:
            volumes, draw, stretch = visits.last, draw - visits.last_from, (1,)
        else:
            volumes, stretch = visits.each_pass, ()
        order = np.random.default_rng([self.seed, draw // len(volumes), *stretch]).permutation(len(volumes))
        return volumes[order[draw % len(volumes)]]

    def seed_of(self, draw: int) -> int:
        """Return the seed of the random transforms of a draw."""
        return int(np.random.SeedSequence([self.seed, draw]).generate_state(1)[0])


class SeededCrops(Dataset):
    """Map-style dataset over draws: ``dataset[i]`` is a list of crops (dicts) of the volume that draw ``i`` selects.

    The volumes are visited in a new random order in every pass over the data. Each crop has a key ``"draw"``, from
    which later steps (masks, rotations) derive their seeds. If any volume has a ``weight`` other than 1, each crop has
    the key ``"weight"``, a float32 scalar. If the label of any volume shows only some structures (`partial_labels`),
    each crop has the key ``"labelled"``, bool (classes,).

    Args:
        data: items of the data list. Transforms do not see their `NOTES`.
        preprocessing: deterministic transforms, whose result is cached.
        augmentation: random transforms, including the crop; applied again for each draw.
        seed: seed of the run.
        cache_num: number of preprocessed volumes to keep in memory.
        shuffle: False: draw ``i`` reads volume ``i``, for validation on the same crops every time.
        visits: the volumes of a pass; None: each volume once.
        classes: number of classes, background included; needed if a label shows only some structures.

    Raises:
        ValueError: a label shows only some structures, and ``classes`` is None.
        InputError: from ``dataset[i]``, if a crop has voxels that are not finite. The message names the file.
    """

    resident = False  # the crops are on the host

    def __init__(
        self,
        *,
        data: Sequence[dict],
        preprocessing: Compose,
        augmentation: Compose,
        seed: int,
        cache_num: int,
        shuffle: bool = True,
        visits: Visits | None = None,
        classes: int | None = None,
    ) -> None:
        self.data = data
        self.partial = any(LABELLED in item for item in data)
        if self.partial and classes is None:
            raise ValueError("classes is needed: a label shows some structures only.")
        self.classes = classes
        self.weights = torch.tensor([float(item.get("weight", 1)) for item in data])
        self.weighted = bool((self.weights != 1).any())
        data = [{key: value for key, value in item.items() if key not in NOTES} for item in data]
        self.volumes = CacheDataset(data, preprocessing, cache_num=cache_num, num_workers=2, progress=len(data) > 20)
        self.augmentation = augmentation
        self.draws = Draws(volumes=len(data), seed=seed, shuffle=shuffle, visits=visits)

    def __len__(self) -> int:
        """Return the number of volumes, which is one pass; draws continue beyond it."""
        return len(self.volumes)

    def volume_of(self, draw: int) -> int:
        """Return the index of the volume that a draw reads."""
        return self.draws.volume_of(draw)

    def __getitem__(self, draw: int) -> list[dict[str, Any]]:
        self.augmentation.set_random_state(seed=self.draws.seed_of(draw))
        volume = self.volume_of(draw)
        try:
            crops = self.augmentation(self.volumes[volume])
        except (RuntimeError, ValueError) as error:  # MONAI wraps the errors of transforms
            if "sampling location" not in f"{error} {error.__cause__}":
                raise
            raise InputError(
                f"{self.data[volume]['image']} has no place to draw a crop from: it contains only air or unknown "
                "voxels. Remove it from the data list."
            ) from error
        notes = {"draw": draw, **({"weight": self.weights[volume]} if self.weighted else {})}
        if self.partial:
            notes[LABELLED] = shown_classes(self.data[volume], classes=self.classes)
        crops = [{**_plain(crop), **notes} for crop in (crops if isinstance(crops, list) else [crops])]
        if not all(torch.isfinite(crop["image"]).all() for crop in crops):
            raise InputError(
                f"{self.data[volume]['image']} has voxels that are not numbers (NaN or infinite). Fix or remove it; "
                "--check_data full finds all such files before a run."
            )
        return crops


class DrawSampler(Sampler[int]):
    """The draws of this rank, from iteration ``first`` to the last.

    With W ranks and B volumes on each, rank r takes the B draws that start at ``i*W*B + r*B`` in iteration i.

    Args:
        iterations: iterations of the whole run.
        batch_size: volumes per iteration on each rank.
    """

    def __init__(self, *, iterations: int, batch_size: int) -> None:
        self.iterations = iterations
        self.batch_size = batch_size
        self.first = 0

    def __len__(self) -> int:
        return (self.iterations - self.first) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for iteration in range(self.first, self.iterations):
            start = (iteration * world_size() + rank()) * self.batch_size
            yield from range(start, start + self.batch_size)


class BatchShare(Sampler[list[int]]):
    """Batches of a validation set in order, shared among the ranks: rank r of W takes batches r, r + W, ...

    The batches do not depend on the number of ranks, so neither does what is measured per batch (with the negatives of
    the contrastive loss). Every rank gets the same number of batches: if they cannot be divided equally, the first ones
    are repeated, and their draw numbers show which to count only once.

    Args:
        number: size of the validation set.
        batch_size: volumes per batch. The last batch may be smaller; a single last volume is added to the previous
            batch, since one volume has no others to be compared with.
    """

    def __init__(self, *, number: int, batch_size: int) -> None:
        self.batches = [list(range(start, min(start + batch_size, number))) for start in range(0, number, batch_size)]
        if len(self.batches) > 1 and len(self.batches[-1]) == 1:
            self.batches[-2:] = [self.batches[-2] + self.batches[-1]]

    def __len__(self) -> int:
        return -(-len(self.batches) // world_size())

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(rank(), len(self) * world_size(), world_size()):
            yield self.batches[index % len(self.batches)]
