# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Random augmentation of training crops on the device, determined by the seed and the number of the draw.

The parameters are drawn on the host (`draw_change`): they are the same on every device, and drawing them never waits
for the GPU. Only the noise field comes from the device's own generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.transforms.utils import create_rotate
from torch.nn import functional as F

from ...common.errors import InputError
from ...common.value_rules import SHARE_BELOW_ONE, ZERO_OR_ABOVE, Rule, is_list, is_share
from .loss import PartlyKnown

TURN = Rule(
    "must be three angles in radians, about the x, y and z axes, 0 or above, such as [0.0,0.0,0.26]",
    lambda value: is_list(value, 3) and min(value) >= 0,
)
GAMMA = Rule(
    "must be the smallest and the largest exponent, above 0",
    lambda value: is_list(value, 2) and 0 < value[0] <= value[1],
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """The augmentation of one crop. Its steps are applied in the order of the attributes.

    Attributes:
        affine: rotation about each axis in radians, then a scale factor along each axis, as in MONAI's
            ``Affine(rotate_params, scale_params)``; None: no affine.
        flips: axes to mirror.
        quarter_turns: number of 90 degree rotations, from the first axis towards the second.
        noise: standard deviation of the Gaussian noise.
        gamma: exponent applied to the intensities, rescaled between their minimum and maximum; None: no change.
        scale: intensities are multiplied by 1 + this.
        shift: added to the intensities.
    """

    affine: tuple[float, float, float, float, float, float] | None = None
    flips: tuple[int, ...] = ()
    quarter_turns: int = 0
    noise: float = 0.0
    gamma: float | None = None
    scale: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Bounds of the augmentation parameters. Each is drawn uniformly.

    Attributes:
        turn: largest rotation about the x, y and z axis in radians, in both directions.
        zoom: scale factors are drawn between 1 - zoom and 1 + zoom, independently for each axis.
        noise: largest standard deviation.
        gamma: smallest and largest exponent.
        scale, shift: largest absolute value.
    """

    turn: tuple[float, float, float]
    zoom: float
    noise: float
    gamma: tuple[float, float]
    scale: float
    shift: float


def draw_change(
    *,
    probabilities: Mapping[str, float | Sequence[float]],
    ranges: Ranges,
    square: bool,
    generator: np.random.Generator,
) -> Change:
    """Draw the augmentation of one crop, as a chain of MONAI's random transforms would.

    Args:
        probabilities: probability of each kind (`augmentation_probabilities`); ``flip`` has one for each axis.
        ranges: bounds of the parameters.
        square: whether the first two axes have equal length. If not, only half turns keep the shape of the crop.
        generator: random generator.
    """

    def happens(kind: str) -> bool:
        return generator.random() < probabilities[kind]

    def mirrored() -> tuple[int, ...]:
        return tuple(axis for axis, chance in enumerate(probabilities["flip"]) if generator.random() < chance)

    def around_zero(most: float) -> float:
        return generator.uniform(-most, most)

    affine = (*(around_zero(turn) for turn in ranges.turn), *(1 + around_zero(ranges.zoom) for _ in range(3)))
    return Change(
        affine=affine if happens("affine") else None,
        flips=mirrored(),
        quarter_turns=(int(generator.integers(1, 4)) if square else 2) if happens("rot90") else 0,
        noise=generator.uniform(0, ranges.noise) if happens("noise") else 0.0,
        gamma=generator.uniform(*ranges.gamma) if happens("contrast") else None,
        scale=around_zero(ranges.scale) if happens("scale_intensity") else 0.0,
        shift=around_zero(ranges.shift) if happens("shift_intensity") else 0.0,
    )


def _affine_grid(affine: Sequence[float], image: torch.Tensor) -> torch.Tensor:
    """Return the sampling grid for `grid_sample`: rotated and scaled about the centre of the crop."""
    angles, zoom = affine[:3], affine[3:]
    turn = create_rotate(3, angles)
    shape = image.shape[1:]
    # From voxels to the unit cube of grid_sample, whose axes are in reverse order.
    theta = [[float(turn[i, j]) * zoom[j] * shape[j] / shape[i] for j in (2, 1, 0)] + [0.0] for i in (2, 1, 0)]
    # Pinned memory: a copy from pageable memory would wait for the GPU.
    theta = torch.tensor(theta, dtype=image.dtype, pin_memory=image.is_cuda)
    return F.affine_grid(theta[None].to(image.device, non_blocking=True), [1, *image.shape], align_corners=False)


def change_crop(
    image: torch.Tensor, label: torch.Tensor, change: Change, *, noise: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an augmented copy of a crop and its label, (C, X, Y, Z) each. The inputs are not modified.

    Interpolation is linear for the image and nearest for the label. Both are padded with 0: what is padded is air in
    the image, so the label calls it background, and not unknown.

    Args:
        image: intensities.
        label: label values.
        change: from `draw_change`.
        noise: generator on the device of the crop; only needed if ``change`` has noise.
    """
    if change.affine is not None:
        grid = _affine_grid(change.affine, image)
        image = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
        label = F.grid_sample(label[None].to(image.dtype), grid, mode="nearest", align_corners=False)[0].to(label.dtype)
    if change.flips:
        axes = [axis + 1 for axis in change.flips]
        image, label = image.flip(axes), label.flip(axes)
    if change.quarter_turns:
        image, label = (x.rot90(change.quarter_turns, (1, 2)) for x in (image, label))
    if change.noise:
        field = torch.randn(image.shape, generator=noise, device=image.device, dtype=image.dtype)
        image = torch.add(image, field, alpha=change.noise)
    if change.gamma is not None:
        low, high = image.aminmax()
        span = high - low
        image = ((image - low) / (span + 1e-7)).pow_(change.gamma).mul_(span).add_(low)
    if change.scale:
        image = image * (1 + change.scale)
    if change.shift:
        image = image + change.shift
    return image, label


class CropAugmentation:
    """``prepare_batch`` for segmentation training: batch of crops to augmented (images, labels) on the device.

    Args:
        seed: seed of the run. The augmentation of a crop depends only on the seed, the number of its draw, and its
            position among the crops of that draw. A resumed run therefore sees the same crops as an uninterrupted one,
            whatever the batch.
        probabilities: see `draw_change`.
        turn, zoom, noise, gamma, scale, shift: see `Ranges`.

    Raises:
        InputError: a range is out of range.
    """

    def __init__(
        self,
        *,
        seed: int,
        probabilities: Mapping[str, float | Sequence[float]],
        turn: Sequence[float],
        zoom: float,
        noise: float,
        gamma: Sequence[float],
        scale: float,
        shift: float,
    ) -> None:
        for name, value, rule in (("turn", turn, TURN), ("zoom", zoom, SHARE_BELOW_ONE), ("gamma", gamma, GAMMA)):
            rule.check(name, value)
        for name, value in (("noise", noise), ("scale", scale), ("shift", shift)):
            ZERO_OR_ABOVE.check(name, value)
        self.seed = seed
        self.probabilities = dict(probabilities)
        self.ranges = Ranges(turn=tuple(turn), zoom=zoom, noise=noise, gamma=tuple(gamma), scale=scale, shift=shift)

    def _generators(self, draws: Sequence[int]) -> list[np.random.Generator]:
        """Return one generator per crop, seeded by its draw and its position in the draw."""
        return [np.random.default_rng([self.seed, draw, draws[:i].count(draw)]) for i, draw in enumerate(draws)]

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | PartlyKnown]:
        """Return images (B, C, X, Y, Z) and labels (B, 1, X, Y, Z).

        The labels are in a `PartlyKnown` if a crop has unknown voxels (``"unknown"``), its case shows only some
        structures (``"labelled"``) or the cases have weights (``"weight"``); all are read on the host.
        """
        images, labels = (batch[key].to(device, non_blocking=non_blocking, **kwargs) for key in ("image", "label"))
        square = images.shape[2] == images.shape[3]
        crops = []
        for i, generator in enumerate(self._generators(batch["draw"].tolist())):  # still on the host
            change = draw_change(
                probabilities=self.probabilities, ranges=self.ranges, square=square, generator=generator
            )
            noise = None
            if change.noise:
                noise = torch.Generator(images.device).manual_seed(int(generator.integers(2**63)))
            crops.append(change_crop(images[i], labels[i], change, noise=noise))
        image, label = (torch.stack(parts) for parts in zip(*crops, strict=True))
        weight, labelled = batch.get("weight"), batch.get("labelled")
        labelled = None if labelled is None or labelled.all() else labelled
        if weight is None and labelled is None and not ("unknown" in batch and batch["unknown"].any()):
            return image, label
        notes = (None if note is None else note.to(device, non_blocking=non_blocking) for note in (weight, labelled))
        return image, PartlyKnown(label, *notes)


KINDS = ("flip", "rot90", "affine", "noise", "contrast", "scale_intensity", "shift_intensity")


def augmentation_probabilities(augmentation: Mapping[str, float | Sequence[float]]) -> dict[str, float | list[float]]:
    """Return the probability of every kind of augmentation; 0 for kinds that are not named.

    Args:
        augmentation: kind (`KINDS`) to probability. ``flip`` is one number for every axis, or three for x, y and z.

    Raises:
        InputError: an unknown kind, or a probability outside [0, 1].
    """
    if not isinstance(augmentation, Mapping):
        raise InputError(
            f"--augmentation {augmentation!r} must map kinds to probabilities, such as \"{{'flip': 0.5, 'noise': 0.1}}\"."
        )
    unknown = sorted(set(augmentation) - set(KINDS))
    if unknown:
        raise InputError(f"--augmentation names {', '.join(unknown)}; available kinds: {', '.join(KINDS)}.")
    requested = {kind: augmentation.get(kind, 0.0) for kind in KINDS}
    flips = requested.pop("flip")
    if not isinstance(flips, Sequence) or isinstance(flips, str):
        flips = [flips] * 3
    if len(flips) != 3:
        raise InputError(f"--augmentation: flip {flips!r} must be one probability, or one for each of the three axes.")
    return {
        "flip": [_probability("flip", flip) for flip in flips],
        **{kind: _probability(kind, chance) for kind, chance in requested.items()},
    }


def _probability(kind: str, chance: object) -> float:
    if not is_share(chance):
        raise InputError(f"--augmentation: {kind} {chance!r} must be a probability between 0 and 1.")
    return float(chance)
