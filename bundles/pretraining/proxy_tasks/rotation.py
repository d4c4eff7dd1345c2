# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Rotation prediction: a crop is rotated by 0, 90, 180 or 270 degrees, and the network predicts the angle.

Tang et al., CVPR 2022, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.errors import InputError
from .draws import draw

#: Planes of rotation, as spatial axes of a crop in RAS (right, anterior, superior). The paper rotates about the z axis.
#: The official code calls ``rot90(x, k, (2, 3))`` on (C, R, A, S), which rotates the anterior-superior plane.
PLANES = {"axial": (0, 1), "official": (1, 2)}


def plane_axes(plane: str) -> tuple[int, int]:
    """Return the two spatial axes of a plane.

    Raises:
        InputError: there is no plane of this name.
    """
    if plane not in PLANES:
        raise InputError(f"rotation_plane {plane!r} is not one of {', '.join(PLANES)}.")
    return PLANES[plane]


def draw_turns(each: int, *, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw the number of quarter turns of each crop, uniform in 0..3: int64 (B,), ``each`` from every generator."""
    return draw(generators, lambda g: torch.randint(4, (each,), generator=g, device=g.device))


def rotate(crops: torch.Tensor, turns: torch.Tensor, *, plane: str) -> torch.Tensor:
    """Rotate crop ``i`` by ``turns[i]`` x 90 degrees, from the first axis of the plane to the second (``numpy.rot90``).

    Args:
        crops: (B, C, X, Y, Z).
        turns: int64 (B,), 0..3, on the same device.
        plane: name of one of the `PLANES`; the crop must be square in it.

    Raises:
        InputError: the crop is not square in the plane.
    """
    first, second = (axis + 2 for axis in plane_axes(plane))
    if crops.shape[first] != crops.shape[second]:
        raise InputError(
            f"a crop of {tuple(crops.shape[2:])} voxels is not square in the {plane} plane (axes {first - 2} and "
            f"{second - 2}): rotation by 90 degrees would change its shape. Choose a roi_size with equal sides there."
        )
    turned = crops
    for quarter in (1, 2, 3):
        turned = torch.where(
            (turns == quarter)[:, None, None, None, None], crops.rot90(quarter, (first, second)), turned
        )
    return turned
