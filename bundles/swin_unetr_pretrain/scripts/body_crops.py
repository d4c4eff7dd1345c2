# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Random crops that hold some of the body: a crop of air alone teaches nothing and is drawn anew."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.transforms import MapTransform, Randomizable, RandSpatialCrop, SpatialPad

from .common.distributed import is_distributed, rank
from .common.optimizer_step import ends_step, steps_done

logger = logging.getLogger(__name__)


class RandBodyCropsd(Randomizable, MapTransform):
    """Several random crops of one size; a volume that is smaller than a crop is padded with zeros (air).

    Each crop carries, for `CropCounts`, ``padded`` (0 or 1), ``redrawn`` (how many crops were thrown away before it) and ``airy`` (1 where every
    try was air).

    Args:
        keys: key of the image, intensities in [0, 1].
        roi_size: size of a crop in voxels.
        num_samples: crops per volume.
        threshold: intensity above which a voxel counts as body.
        min_body: share of a crop's voxels that must be body.
        tries: how often a crop is drawn at most; the last one is kept.
    """

    def __init__(
        self,
        keys: str,
        *,
        roi_size: Sequence[int],
        num_samples: int,
        threshold: float,
        min_body: float,
        tries: int = 20,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.pad = SpatialPad(roi_size)
        self.crop = RandSpatialCrop(roi_size, random_size=False)
        self.num_samples = num_samples
        self.threshold = threshold
        self.min_body = min_body
        self.tries = tries

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandBodyCropsd:
        super().set_random_state(seed, state)
        self.crop.set_random_state(state=self.R)
        return self

    def _is_air(self, crop: torch.Tensor) -> bool:
        return bool((crop > self.threshold).float().mean() < self.min_body)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        key = self.keys[0]
        volume = self.pad(data[key])
        padded = int(volume.shape != data[key].shape)
        crops = []
        for _ in range(self.num_samples):
            redrawn, crop = 0, self.crop(volume)
            while (airy := self._is_air(crop)) and redrawn < self.tries - 1:
                redrawn, crop = redrawn + 1, self.crop(volume)
            crops.append({**data, key: crop, "padded": padded, "redrawn": redrawn, "airy": int(airy)})
        return crops


COUNTS = ("padded", "redrawn", "airy")


class CropCounts:
    """Handler for `SupervisedTrainer`: says once that volumes are padded, and when a log is due how many crops were drawn anew.

    Args:
        every: steps between two lines at most; nothing new, no line.
    """

    def __init__(self, *, every: int) -> None:
        self.every = max(1, every)
        self.said: dict[str, int] = {}

    def attach(self, engine: Engine) -> None:
        """Count in ``engine.state.crops``, which is kept with the state of the engine, the crops of all ranks."""
        engine.state.crops = dict.fromkeys(COUNTS, 0)
        engine.state_dict_user_keys.append("crops")
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def started(self, engine: Engine) -> None:
        """Nothing was said yet."""
        self.said = dict.fromkeys(COUNTS, 0)
        self.own = torch.zeros(len(COUNTS), dtype=torch.int64)

    def __call__(self, engine: Engine) -> None:
        self.own += torch.stack([engine.state.batch[name].sum() for name in COUNTS]).cpu()
        ends_epoch = engine.state.iteration % engine.state.epoch_length == 0
        if not ends_step(engine) or (steps_done(engine) % self.every and not ends_epoch):
            return
        new = self.own.clone().to(getattr(engine.state, "device", "cpu"))
        if is_distributed():
            dist.all_reduce(new)
        self.own.zero_()
        engine.state.crops = counts = {
            name: engine.state.crops[name] + int(number) for name, number in zip(COUNTS, new, strict=True)
        }
        if rank() > 0:
            return
        if counts["padded"] and not self.said["padded"]:
            logger.warning("some volumes are smaller than the ROI and are padded with air (said once)")
        if any(counts[name] > self.said[name] for name in ("redrawn", "airy")):
            logger.info(
                "%d crops of air drawn anew so far; %d kept, with less body than --min_body in all tries",
                *(counts["redrawn"], counts["airy"]),
            )
        self.said = dict(counts)
