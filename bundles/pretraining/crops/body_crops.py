# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Random crops that contain some of the body: crops of air only are useless for training and are drawn again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data.utils import get_random_patch
from monai.transforms import MapTransform, Randomizable, SpatialCrop, SpatialPad

from ...common.run.distributed import is_distributed, rank
from ...common.training.steps import ends_step, steps_done
from ...common.value_rules import SHARE

logger = logging.getLogger(__name__)


class RandBodyCropsd(Randomizable, MapTransform):
    """Draw several random crops of one size. Volumes smaller than a crop are padded with zeros (air).

    Each crop has its ``affine``, (4, 4) float64 from its voxel indices to mm in RAS, and, for `CropCounts`, ``padded``
    (0 or 1), ``redrawn`` (number of crops discarded before it) and ``airy`` (1 if every try was air).

    Args:
        keys: key of the image, intensities in [0, 1].
        roi_size: size of a crop in voxels.
        num_samples: crops per volume.
        threshold: intensity above which a voxel counts as body.
        min_body: smallest share of body voxels in a crop.
        tries: largest number of tries for a crop; the last one is kept.
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
        SHARE.check("min_body", min_body)
        MapTransform.__init__(self, keys)
        self.roi_size = tuple(roi_size)
        self.pad = SpatialPad(self.roi_size)
        self.num_samples = num_samples
        self.threshold = threshold
        self.min_body = min_body
        self.tries = tries

    def _is_air(self, crop: torch.Tensor) -> bool:
        return bool((crop > self.threshold).float().mean() < self.min_body)

    def draw(
        self,
        shape: Sequence[int],
        read: Callable[[tuple[slice, ...]], torch.Tensor],
        *,
        intensities: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[tuple[torch.Tensor, tuple[slice, ...], dict[str, int]]]:
        """Draw the positions of the crops, and read only these parts of the volume.

        Args:
            shape: (X, Y, Z) of the padded volume.
            read: returns the box of three slices of the padded volume, (1, *roi_size).
            intensities: maps what was read to [0, 1], to tell air from body; None if it is in [0, 1] already.

        Returns:
            Each crop as it was read, its box, and its ``redrawn`` and ``airy``.
        """

        def draw_one() -> tuple[torch.Tensor, tuple[slice, ...], bool]:
            box = get_random_patch(shape, self.roi_size, self.R)
            crop = read(box)
            return crop, box, self._is_air(intensities(crop) if intensities else crop)

        crops = []
        for _ in range(self.num_samples):
            redrawn, (crop, box, airy) = 0, draw_one()
            while airy and redrawn < self.tries - 1:
                redrawn, (crop, box, airy) = redrawn + 1, draw_one()
            crops.append((crop, box, {"redrawn": redrawn, "airy": int(airy)}))
        return crops

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        key = self.keys[0]
        volume = self.pad(data[key])
        padded = int(volume.shape != data[key].shape)
        drawn = self.draw(volume.shape[1:], lambda box: SpatialCrop(roi_slices=box)(volume))
        return [
            {**data, key: crop, "affine": crop.affine.clone(), "padded": padded, **counts} for crop, _, counts in drawn
        ]


COUNTS = ("padded", "redrawn", "airy")


class CropCounts:
    """Handler for `SupervisedTrainer`: log how many crops were drawn again, and once that volumes are padded.

    Args:
        every: steps between two log lines, or more if nothing changed.
    """

    def __init__(self, *, every: int) -> None:
        self.every = max(1, every)
        self.reported: dict[str, int] = {}

    def attach(self, engine: Engine) -> None:
        """Count the crops of all ranks in ``engine.state.crops``, which is saved with the state of the engine."""
        engine.state.crops = dict.fromkeys(COUNTS, 0)
        engine.state_dict_user_keys.append("crops")
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def started(self, engine: Engine) -> None:
        """Reset what was reported."""
        self.reported = dict.fromkeys(COUNTS, 0)
        self.own = torch.zeros(len(COUNTS), dtype=torch.int64)

    def __call__(self, engine: Engine) -> None:
        # On the host, like the counts from the loader.
        self.own += torch.stack([engine.state.batch[name].sum() for name in COUNTS])
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
        if counts["padded"] and not self.reported["padded"]:
            logger.warning("some volumes are smaller than the ROI and are padded with air (reported only once)")
        if any(counts[name] > self.reported[name] for name in ("redrawn", "airy")):
            logger.info(
                "%d crops of air drawn again so far; %d kept, with less body than --min_body in all tries",
                *(counts["redrawn"], counts["airy"]),
            )
        self.reported = dict(counts)
