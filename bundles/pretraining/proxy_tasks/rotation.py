# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Rotation prediction: a crop is turned by 0, 90, 180 or 270 degrees and the network tells by how much (paper section 3.2)."""

from __future__ import annotations

import torch

from ...common.errors import InputError

#: Planes in which a crop turns, as spatial axes of an RAS-oriented crop (right, anterior, superior). The paper turns about the
#: z axis; the official code calls ``rot90(x, k, (2, 3))`` on (C, R, A, S), which turns the anterior-superior plane.
PLANES = {"axial": (0, 1), "official": (1, 2)}


def plane_axes(plane: str) -> tuple[int, int]:
    """The two spatial axes that a rotation mixes.

    Raises:
        InputError: if there is no plane of that name.
    """
    if plane not in PLANES:
        raise InputError(f"rotation_plane {plane!r} is not one of {', '.join(PLANES)}.")
    return PLANES[plane]


def draw_turns(batch: int, *, generator: torch.Generator) -> torch.Tensor:
    """Number of quarter turns of each crop, uniform in 0..3: int64 (B,)."""
    return torch.randint(4, (batch,), generator=generator, device=generator.device)


def rotate(crops: torch.Tensor, turns: torch.Tensor, *, plane: str) -> torch.Tensor:
    """Turn crop ``i`` by ``turns[i]`` x 90 degrees, from the plane's first axis towards its second (``numpy.rot90``).

    Args:
        crops: (B, C, X, Y, Z).
        turns: int64 (B,), 0..3, on the same device.
        plane: a name of `PLANES`; the crop must be square in it.

    Raises:
        InputError: if the crop is not square in the plane.
    """
    first, second = (axis + 2 for axis in plane_axes(plane))
    if crops.shape[first] != crops.shape[second]:
        raise InputError(
            f"a crop of {tuple(crops.shape[2:])} voxels is not square in the {plane} plane (axes {first - 2} and {second - 2}): "
            "turned by 90 degrees it would have another shape. Choose a roi_size that is equal there."
        )
    turned = crops
    for quarter in (1, 2, 3):
        turned = torch.where(
            (turns == quarter)[:, None, None, None, None], crops.rot90(quarter, (first, second)), turned
        )
    return turned
