# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Draw a synthetic patient: abdominal CT with the 13 organs of BTCV.

`draw_patient` draws the random parameters of a patient, and `render` computes its voxels. One body made of ellipsoids
and tubes is scaled, rotated, deformed and shifted differently for each patient. It is not a model of real anatomy, but
complex enough that a network must learn positions, shapes and contrasts together.

Body coordinates are RAS in mm: x points to the patient's right, y to the front and z to the head. The origin is on the
midline in the middle of the abdomen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

ORGANS: dict[int, str] = {
    1: "spleen",
    2: "right_kidney",
    3: "left_kidney",
    4: "gallbladder",
    5: "esophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior_vena_cava",
    10: "portal_and_splenic_veins",
    11: "pancreas",
    12: "right_adrenal_gland",
    13: "left_adrenal_gland",
}


class Ellipsoid(NamedTuple):
    """Ellipsoid: centre and half axes in mm, rotation about x, y and z in degrees."""

    centre: tuple[float, float, float]
    axes: tuple[float, float, float]
    turn: tuple[float, float, float] = (0, 0, 0)

    def level(self, points: np.ndarray) -> np.ndarray:
        """Return 0 at the centre and 1 on the surface for ``points`` (N, 3)."""
        local = Rotation.from_euler("xyz", self.turn, degrees=True).inv().as_matrix() @ (points - self.centre).T
        return np.sqrt(((local / np.array(self.axes)[:, None]) ** 2).sum(0))

    def reach(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest corner of a box that contains the shape."""
        return np.array(self.centre) - max(self.axes), np.array(self.centre) + max(self.axes)


class Tube(NamedTuple):
    """Tube: points of its centre line and one radius per point, in mm."""

    line: tuple[tuple[float, float, float], ...]
    radii: tuple[float, ...]

    def level(self, points: np.ndarray) -> np.ndarray:
        """Return 0 on the centre line and 1 on the surface for ``points`` (N, 3)."""
        lowest = np.full(len(points), np.inf)
        for start, end, first, last in zip(
            np.array(self.line[:-1]), np.array(self.line[1:]), self.radii[:-1], self.radii[1:], strict=True
        ):
            along = np.clip((points - start) @ (end - start) / ((end - start) ** 2).sum(), 0, 1)
            distance = np.linalg.norm(points - start - along[:, None] * (end - start), axis=1)
            lowest = np.minimum(lowest, distance / (first + along * (last - first)))
        return lowest

    def reach(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest corner of a box that contains the shape."""
        return np.min(self.line, 0) - max(self.radii), np.max(self.line, 0) + max(self.radii)


# Drawn in this order: where two organs overlap, the voxels belong to the later one.
SHAPES: dict[int, tuple[Ellipsoid | Tube, ...]] = {
    7: (
        Ellipsoid((-58, 12, 58), (36, 38, 36)),
        Ellipsoid((-52, 42, 18), (28, 26, 42), (15, 0, 0)),
        Ellipsoid((-16, 60, -10), (38, 19, 21), (0, 15, 0)),
    ),
    6: (Ellipsoid((76, 6, 34), (60, 72, 72)), Ellipsoid((12, 50, 50), (58, 30, 34), (0, 15, 0))),
    1: (Ellipsoid((-108, -36, 42), (25, 44, 50), (15, 10, -20)),),
    2: (Ellipsoid((60, -46, -38), (27, 26, 50), (-8, 10, 0)),),
    3: (Ellipsoid((-60, -46, -22), (27, 26, 52), (-8, -10, 0)),),
    4: (Ellipsoid((58, 56, -28), (18, 20, 32), (-20, 10, 0)),),
    11: (
        Ellipsoid((26, 14, -30), (17, 15, 24)),
        Tube(((20, 20, -14), (0, 26, -6), (-30, 12, 4), (-76, -14, 20)), (11, 11, 12, 10)),
    ),
    9: (Tube(((24, -14, 80), (22, -18, 30), (20, -20, -40), (16, -22, -150)), (13, 13, 12, 11)),),
    8: (Tube(((-18, -30, 160), (-16, -26, 80), (-10, -18, 0), (-6, -22, -150)), (12, 12, 11, 10)),),
    10: (
        Tube(((-84, -22, 32), (-40, 2, 20), (6, 8, 4), (14, 8, 4)), (6, 7, 8, 9)),
        Tube(((14, 8, 4), (26, 8, 22), (46, 10, 36)), (9, 9, 8)),
        Tube(((12, 10, 4), (8, 16, -50)), (8, 7)),
    ),
    5: (Tube(((-6, -4, 150), (-10, 0, 100), (-34, 6, 66)), (10, 10, 10)),),
    12: (
        Ellipsoid((34, -40, 26), (5, 15, 15), (0, 0, 20)),
        Ellipsoid((42, -44, 26), (5, 13, 14), (0, 0, -30)),
    ),
    13: (
        Ellipsoid((-32, -30, 30), (5, 15, 15), (0, 0, -20)),
        Ellipsoid((-40, -34, 30), (5, 13, 14), (0, 0, 30)),
    ),
}

# Mean HU of each organ in the late arterial and in the portal venous phase, and standard deviation between patients.
CONTRAST: dict[int, tuple[float, float, float]] = {
    1: (150, 128, 8),
    2: (190, 205, 10),
    3: (190, 205, 10),
    4: (5, 5, 6),
    5: (60, 65, 6),
    6: (85, 112, 6),
    7: (20, 20, 10),
    8: (280, 185, 12),
    9: (110, 150, 10),
    10: (150, 190, 10),
    11: (110, 85, 7),
    12: (125, 105, 8),
    13: (125, 105, 8),
}


@dataclass(frozen=True)
class Patient:
    """The random parameters of one scan.

    Lengths are in mm, angles in degrees. The ``waves`` describe a smooth deformation: a body point p is displaced by
    the sum over k of ``waves_height[k] * sin(waves_vector[k] . p + waves_phase[k])``.
    """

    seed: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    oblique: np.ndarray  # (3,) rotation of the grid against the scanner's axes; zero for three of four patients
    centre: np.ndarray  # (3,) scanner coordinates (RAS) of the grid's centre
    place: np.ndarray  # (3,) body origin relative to the grid's centre
    size: np.ndarray  # (3,) scale factors of the body
    tilt: np.ndarray  # (3,) rotation of the body
    waves_height: np.ndarray  # (K, 3)
    waves_vector: np.ndarray  # (K, 3), radians per mm
    waves_phase: np.ndarray  # (K, 3)
    organ_shift: dict[int, np.ndarray]  # (3,) each
    organ_size: dict[int, np.ndarray]  # (3,) each
    organ_turn: dict[int, np.ndarray]  # (3,) each
    organ_hu: dict[int, float]
    fat: float  # thickness of the fat under the skin
    stomach_gas: float  # y of the gas level in the stomach
    bowel: np.ndarray  # (L, 8) loops: centre, half axes, HU of the wall, HU of the content
    lung_top: float  # z of the domes of the diaphragm
    table: float  # gap between back and table
    bone_hu: float
    noise: float  # standard deviation in HU
    bias: np.ndarray  # (3,) HU difference between opposite sides of the grid
    noise_seed: int


def draw_patient(seed: int) -> Patient:
    """Draw all parameters of one patient.

    Args:
        seed: any non-negative integer. The same seed gives the same patient.
    """
    rng = np.random.default_rng(seed)
    shape = tuple(int(rng.integers(low, high + 1)) for low, high in ((88, 104), (72, 88), (52, 64)))
    in_plane = float(rng.uniform(3.7, 4.4))
    spacing = (in_plane, in_plane, float(rng.uniform(4.9, 5.5)))
    size = rng.uniform((0.86, 0.86, 0.84), (1.08, 1.08, 1.02))
    # The organs fill this box of the body. The grid may be anywhere around it: it may cut off skin but not organs. The
    # sine favours the extreme positions, so that the label map of one patient rarely fits another.
    low, high = np.array((-138, -90, -96)) * size, np.array((142, 96, 108)) * size
    half = np.array(shape) * spacing / 2 - 8
    lowest, highest = np.minimum(-half - low, 0), np.maximum(half - high, 0)
    share = np.array((0.9, 0.9, 1)) * np.sin(rng.uniform(-np.pi / 2, np.pi / 2, 3)) / 2
    place = (lowest + highest) / 2 + share * (highest - lowest)
    waves = 4
    vector = rng.normal(size=(waves, 3))
    vector *= 2 * np.pi / rng.uniform(120, 260, (waves, 1)) / np.linalg.norm(vector, axis=1, keepdims=True)
    phase = rng.uniform(0, 1)  # 0: late arterial, 1: portal venous
    loops = int(rng.integers(22, 34))
    gas = rng.uniform(size=loops) < 0.3
    return Patient(
        seed=seed,
        shape=shape,
        spacing=spacing,
        oblique=rng.uniform(-5, 5, 3) * (rng.uniform() < 0.25),
        centre=rng.uniform((-25, -40, -900), (25, 10, 300)),
        place=place,
        size=size,
        tilt=rng.uniform((-4, -4, -8), (4, 4, 8)),
        waves_height=rng.uniform(-3.5, 3.5, (waves, 3)),
        waves_vector=vector,
        waves_phase=rng.uniform(0, 2 * np.pi, (waves, 3)),
        organ_shift={organ: rng.uniform(-5, 5, 3) for organ in ORGANS},
        organ_size={organ: rng.uniform(0.9, 1.12, 3) for organ in ORGANS},
        organ_turn={organ: rng.uniform(-6, 6, 3) for organ in ORGANS},
        organ_hu={
            organ: float(early + phase * (late - early) + rng.normal() * spread)
            for organ, (early, late, spread) in CONTRAST.items()
        },
        fat=float(rng.uniform(8, 26)),
        stomach_gas=float(rng.uniform(50, 66)),
        bowel=np.column_stack(
            [
                rng.uniform((-110, -5, -160), (110, 85, -45), (loops, 3)),
                rng.uniform(11, 24, (loops, 3)),
                rng.uniform(40, 90, loops),
                np.where(gas, -850, rng.uniform(20, 60, loops)),
            ]
        ),
        lung_top=float(rng.uniform(100, 112)),
        table=float(rng.uniform(2, 10)),
        bone_hu=float(rng.uniform(320, 480)),  # a scan without values above 300 looks windowed
        noise=float(rng.uniform(8, 15)),
        bias=rng.uniform(-8, 8, 3),
        noise_seed=int(rng.integers(2**32)),
    )


def render(patient: Patient) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute a scan and its label map. The same patient always gives the same voxels.

    Returns:
        Image (X, Y, Z) int16 in HU; label map (X, Y, Z) uint8 with the ids of `ORGANS`; affine (4, 4) from voxel to RAS
        mm, whose first two diagonal entries are negative, as in most CT.
    """
    affine = grid_affine(patient)
    body = body_coordinates(patient, affine)
    image, room, chest = paint_body(patient, body)
    label = np.zeros(patient.shape, np.uint8)
    for organ, shapes in SHAPES.items():
        # Esophagus, aorta and vena cava pass through the chest. All other organs stay below the diaphragm.
        allowed = room | chest if organ in (5, 8, 9) else room
        where, level, points = organ_voxels(patient, organ, shapes, body)
        keep = allowed.reshape(-1)[where]
        where, level, points = where[keep], level[keep], points[keep]
        label.reshape(-1)[where] = organ
        image.reshape(-1)[where] = organ_intensity(patient, organ, level, points)
    image = gaussian_filter(image, 0.5)  # partial volume
    return np.clip(image + noise_and_bias(patient), -1024, 3071).round().astype(np.int16), label, affine


def grid_affine(patient: Patient) -> np.ndarray:
    """Return the (4, 4) matrix from voxel index to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", patient.oblique, degrees=True).as_matrix() @ np.diag(
        np.array(patient.spacing) * (-1, -1, 1)
    )
    affine[:3, 3] = patient.centre - affine[:3, :3] @ ((np.array(patient.shape) - 1) / 2)
    return affine


def body_coordinates(patient: Patient, affine: np.ndarray) -> np.ndarray:
    """Return the position of each voxel in the undeformed body, (X, Y, Z, 3) float32 in mm."""
    turn = Rotation.from_euler("xyz", patient.tilt, degrees=True).as_matrix()
    to_body = np.diag(1 / patient.size) @ turn.T
    matrix = (to_body @ affine[:3, :3]).astype(np.float32)
    start = (to_body @ (affine[:3, 3] - patient.centre - patient.place)).astype(np.float32)
    i, j, k = np.ogrid[tuple(slice(n) for n in patient.shape)]
    body = np.stack([row[0] * i + row[1] * j + row[2] * k + at for row, at in zip(matrix, start, strict=True)], axis=-1)
    body = body.astype(np.float32)
    moved = body.copy()
    for height, vector, phase in zip(patient.waves_height, patient.waves_vector, patient.waves_phase, strict=True):
        turn_angle = body @ vector.astype(np.float32)
        moved += height.astype(np.float32) * np.sin(turn_angle[..., None] + phase.astype(np.float32))
    return moved


def paint_body(patient: Patient, body: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw everything except the organs.

    Returns:
        Image (X, Y, Z) float32 in HU; masks (bool) of the abdomen and of the chest where organs may be.
    """
    x, y, z = body[..., 0], body[..., 1], body[..., 2]
    fat = patient.fat

    def ring(margin: float) -> np.ndarray:  # < 1 inside an oval, `margin` mm outside the abdominal cavity
        return (np.abs(x) / (142 + margin)) ** 2.4 + (np.abs(y) / (100 + margin)) ** 2.4

    image = np.full(patient.shape, -1000, np.float32)
    top = -100 - 14 - fat - 3 - patient.table
    image[(np.abs(y - top + 14 - (x / 40) ** 2) < 7) & (np.abs(x) < 210)] = -120  # table, a shallow trough
    image[ring(14 + fat + 3) < 1] = 0  # skin
    image[ring(14 + fat) < 1] = -105
    wall = ring(14) < 1
    image[wall] = 55
    cavity = ring(0) < 1
    image[cavity] = -95
    angle = np.abs(np.arctan2(x, -y))  # 0 at the back, pi in front
    rib = wall & ~(ring(3) < 1) & ((z + 22 * angle) % 30 < 10) & (z > -40) & (angle > 0.3) & (angle < 2.6)
    image[rib] = patient.bone_hu

    dome = patient.lung_top - (np.minimum((x - 72) ** 2, (x + 72) ** 2) + (y - 5) ** 2) / 75
    chest = cavity & (z > np.maximum(dome, 30))
    lung = chest & (np.abs(x + 8) > 34 - 0.1 * y)
    image[chest] = -50  # mediastinum, mostly fat
    image[lung] = -840
    image[cavity & ~chest & (z > np.maximum(dome, 30) - 5)] = 50  # diaphragm

    def paint(shape: Ellipsoid | Tube, value: float) -> None:
        where, level = shape_voxels(shape, body)
        image.reshape(-1)[where[level < 1]] = value

    paint(Ellipsoid((-18, 40, 142), (52, 42, 36)), 0.5 * (patient.organ_hu[8] + 60))  # heart
    for side in (-1, 1):
        paint(Tube(((side * 34, -84, 170), (side * 34, -84, -170)), (22, 24)), 55)  # muscles of the back
        paint(Tube(((side * 30, -52, 0), (side * 46, -40, -170)), (10, 26)), 58)  # psoas
    for row in patient.bowel:
        loop = Ellipsoid(tuple(row[:3]), tuple(row[3:6]))
        where, level = shape_voxels(loop, body)
        inside = cavity.reshape(-1)[where] & (level < 1)
        image.reshape(-1)[where[inside]] = np.where(level[inside] > 0.75, row[6], row[7])

    # Vertebrae with discs between them, the spinal canal behind and spinous processes.
    column = (x / 22) ** 2 + ((y + 56) / 18) ** 2 < 1
    image[column] = np.where((z % 34 < 26)[column], 0.75 * patient.bone_hu, 80)
    image[(column & ((x / 18) ** 2 + ((y + 56) / 14) ** 2 > 1)) & (z % 34 < 26)] = patient.bone_hu
    arch = ((x / 18) ** 2 + ((y + 84) / 15) ** 2 < 1) | ((np.abs(x) < 5) & (y < -84) & (y > -112) & (z % 34 < 22))
    image[arch] = patient.bone_hu
    image[(x / 10) ** 2 + ((y + 83) / 9) ** 2 < 1] = 30
    return image, cavity & ~chest & ~column & ~arch, chest & ~column & ~arch


def shape_voxels(shape: Ellipsoid | Tube, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat indices of the voxels in the box around a shape, and the level of the shape there."""
    low, high = shape.reach()
    flat = points.reshape(-1, 3)
    inside = np.ones(len(flat), bool)
    for axis in range(3):
        inside &= (flat[:, axis] > low[axis]) & (flat[:, axis] < high[axis])
    where = np.flatnonzero(inside)
    return where, shape.level(flat[where])


def organ_voxels(
    patient: Patient, organ: int, shapes: tuple[Ellipsoid | Tube, ...], body: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the voxels of an organ: flat indices, level (0 inside to 1 on the surface) and body coordinates."""
    low = np.min([shape.reach()[0] for shape in shapes], 0)
    high = np.max([shape.reach()[1] for shape in shapes], 0)
    middle = (low + high) / 2
    flat = body.reshape(-1, 3)
    inside = np.ones(len(flat), bool)
    for axis in range(3):  # a box with a margin for the patient's shift, size and rotation
        inside &= np.abs(flat[:, axis] - middle[axis]) < 1.3 * (high - low)[axis] / 2 + 10
    where = np.flatnonzero(inside)
    points = flat[where].astype(np.float64)
    turn = Rotation.from_euler("xyz", patient.organ_turn[organ], degrees=True).as_matrix()
    local = (points - middle - patient.organ_shift[organ]) @ turn / patient.organ_size[organ] + middle
    level = np.min([shape.level(local) for shape in shapes], 0)
    inside = level < 1
    return where[inside], level[inside], points[inside]


def organ_intensity(patient: Patient, organ: int, level: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the HU of an organ's voxels: uniform, except for kidneys, esophagus and stomach, which have a content."""
    hu = np.full(len(level), patient.organ_hu[organ], np.float32)
    if organ in (2, 3):
        hu[level < 0.4] -= 70  # the renal pelvis
    elif organ == 5:
        hu[level < 0.35] -= 120  # a little air
    elif organ == 7:
        hu[points[:, 1] > patient.stomach_gas] = -850  # the patient lies on the back, so gas is in front
        hu[level > 0.85] = 85
    return hu


def noise_and_bias(patient: Patient) -> np.ndarray:
    """Return noise, correlated between neighbours as after reconstruction, plus a linear drift over the grid."""
    rng = np.random.default_rng(patient.noise_seed)
    white = rng.standard_normal(patient.shape, np.float32)
    smooth = gaussian_filter(rng.standard_normal(patient.shape, np.float32), 0.9)
    noise = white + 1.2 * smooth / smooth.std()
    axes = np.ogrid[tuple(slice(-0.5, 0.5, n * 1j) for n in patient.shape)]
    drift = sum(slope * axis for slope, axis in zip(patient.bias, axes, strict=True))
    return (patient.noise * noise / noise.std() + drift).astype(np.float32)
