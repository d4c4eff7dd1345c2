# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Miniature versions of the Decathlon's ten tasks: its folders, names, types and labels, with ellipsoids as bodies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

TUMOUR_WORDS = ("cancer", "tumour")
AIR, LUNG, FAT, MUSCLE, BONE = -1000, -850, -90, 50, 700  # HU
STRUCTURES = (60, 110)  # HU, by label


@dataclass(frozen=True)
class Form:
    """The form in which a task is shipped.

    Attributes:
        name: as in its ``dataset.json``.
        description: as in its ``dataset.json``.
        channels: as in its ``dataset.json``.
        labels: as in its ``dataset.json``, without background.
        case: format of case names, filled with a number.
        first: number of the first case.
        shape: approximate shape in voxels.
        spacing: spacing in mm.
        body: radii of the body relative to half the volume; above the square root of 3 it fills the volume.
    """

    name: str
    description: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    case: str
    first: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    body: float = 0.85


# Names and texts are those of MSD's dataset.json files. Spacings are two to five times the task's median, so that
# volumes have few voxels but similar anisotropy; the hippocampus has its real size. (Medians: nnU-Net, Isensee et al.,
# Nature Methods 2021; quoted from memory, not verified.)
FORMS = {
    "Task01_BrainTumour": Form(
        "BRATS",
        "Gliomas segmentation tumour and oedema in on brain images",
        ("FLAIR", "T1w", "t1gd", "T2w"),
        ("edema", "non-enhancing tumor", "enhancing tumour"),
        "BRATS_{:03d}",
        1,
        (48, 52, 40),
        (3.0, 3.0, 3.0),
    ),
    "Task02_Heart": Form(
        "LeftAtrium",
        "Left Atrium Segmentation",
        ("MRI",),
        ("left atrium",),
        "la_{:03d}",
        3,
        (56, 48, 24),
        (3.75, 3.75, 4.1),
    ),
    "Task03_Liver": Form(
        "Liver",
        "Liver and cancer segmentation",
        ("CT",),
        ("liver", "cancer"),
        "liver_{}",
        0,
        (72, 56, 28),
        (3.85, 3.85, 5.0),
    ),
    "Task04_Hippocampus": Form(
        "Hippocampus",
        "Left and right hippocampus segmentation",
        ("MRI",),
        ("Anterior", "Posterior"),
        "hippocampus_{:03d}",
        1,
        (35, 50, 36),
        (1.0, 1.0, 1.0),
        body=2.0,
    ),
    "Task05_Prostate": Form(
        "PROSTATE",
        "Prostate transitional zone and peripheral zone segmentation",
        ("T2", "ADC"),
        ("PZ", "TZ"),
        "prostate_{:02d}",
        0,
        (64, 60, 16),
        (2.48, 2.48, 14.4),
    ),
    "Task06_Lung": Form(
        "Lung",
        "Lung and cancer segmentation",
        ("CT",),
        ("cancer",),
        "lung_{:03d}",
        1,
        (68, 56, 24),
        (3.95, 3.95, 6.2),
    ),
    "Task07_Pancreas": Form(
        "PANCREAS",
        "Pancreas and pancreatic tumour mass segmentation",
        ("CT",),
        ("pancreas", "cancer"),
        "pancreas_{:03d}",
        1,
        (80, 72, 16),
        (2.4, 2.4, 7.5),
    ),
    "Task08_HepaticVessel": Form(
        "HepaticVessel",
        "Hepatic vessels and tumour segmentation",
        ("CT",),
        ("Vessel", "Tumour"),
        "hepaticvessel_{:03d}",
        1,
        (80, 72, 14),
        (1.6, 1.6, 10.0),
    ),
    "Task09_Spleen": Form(
        "Spleen",
        "Spleen Segmentation",
        ("CT",),
        ("spleen",),
        "spleen_{}",
        2,
        (80, 72, 14),
        (1.58, 1.58, 10.0),
    ),
    "Task10_Colon": Form(
        "colon",
        "Colon cancer primaries segmentation",
        ("CT",),
        ("colon cancer primaries",),
        "colon_{:03d}",
        1,
        (80, 72, 14),
        (1.56, 1.56, 10.0),
    ),
}


def write_miniature(folder: Path, task: str, *, cases: int = 5, tests: int = 2, seed: int = 0) -> Path:
    """Write ``FOLDER/TASK`` with ``dataset.json``, ``imagesTr``, ``labelsTr`` and ``imagesTs``, as MSD unpacks.

    Images are int16 (CT, HU) or float32 (MR, zero outside the body, with arbitrary units), with channels along the
    fourth axis. Labels are uint8. Every case has every label, except that the first case lacks the last label if that
    is a tumour.

    Args:
        folder: parent folder, created if missing.
        task: key of `FORMS`.
        cases: number of labelled cases.
        tests: number of test images.
        seed: seed of the patients; the first cases do not depend on the number of cases.

    Returns:
        The task's folder.
    """
    form, folder = FORMS[task], Path(folder) / task
    with_tumour = any(word in form.labels[-1].lower() for word in TUMOUR_WORDS)
    training, test = [], []
    for number in range(cases + tests):
        image, label, affine = draw_case(form, seed=[seed, number], healthy=with_tumour and number == 0)
        # Numbers have gaps and exceed 10: sorted as text, liver_4 comes after liver_12.
        name = form.case.format(form.first + 4 * number) + ".nii.gz"
        part = "Tr" if number < cases else "Ts"
        _save(folder / f"images{part}" / name, image, affine)
        if part == "Ts":
            test.append(f"./imagesTs/{name}")
            continue
        _save(folder / "labelsTr" / name, label, affine)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {
        "name": form.name,
        "description": form.description,
        "tensorImageSize": "4D" if len(form.channels) > 1 else "3D",
        "modality": {str(number): channel for number, channel in enumerate(form.channels)},
        "labels": {str(value): word for value, word in enumerate(("background", *form.labels))},
        "numTraining": cases,
        "numTest": tests,
        "training": training,
        "test": test,
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))
    return folder


def draw_case(form: Form, *, seed: list[int], healthy: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a body with nested structures: each label is inside the previous one.

    Args:
        form: form of the task.
        seed: seed of the patient.
        healthy: whether to omit the last label.

    Returns:
        Image (X, Y, Z) or (X, Y, Z, C), label (X, Y, Z), affine.
    """
    rng = np.random.default_rng(seed)
    shape = tuple(int(side) + rng.integers(-2, 3) for side in form.shape)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij"), axis=-1)
    body = np.linalg.norm(at, axis=-1) < form.body
    centre = rng.uniform(-0.15, 0.15, 3)
    label = np.zeros(shape, np.uint8)
    for value in range(1, len(form.labels) + 1 - healthy):
        radii = rng.uniform(0.4, 0.5, 3) * 0.65 ** (value - 1)
        label[np.linalg.norm((at - centre) / radii, axis=-1) < 1] = value
    if form.channels == ("CT",):
        hu = np.array([LUNG if form.name == "Lung" else FAT, *STRUCTURES])[label]
        hu[np.linalg.norm(at, axis=-1) > 0.9 * form.body] = MUSCLE
        hu[np.linalg.norm(at[..., :2] - [0, -0.6], axis=-1) < 0.1] = BONE  # the spine
        image = np.where(body, hu, AIR) + rng.normal(0, 12, shape)
        image = np.clip(np.round(image), -1024, 3071).astype(np.int16)
    else:
        scale = 10 ** rng.uniform(1, 3)  # MR has no units
        contrasts = rng.uniform(0.4, 2, (len(form.channels), len(form.labels) + 1))
        image = np.stack([contrast[label] * rng.normal(1, 0.05, shape) for contrast in contrasts], axis=-1)
        image = (np.where(body[..., None], scale * image, 0)).astype(np.float32)
        image = image if len(form.channels) > 1 else image[..., 0]
    return image, label, _affine(form, rng)


def _affine(form: Form, rng: np.random.Generator) -> np.ndarray:
    """Random affine: left-handed, as the Decathlon's CTs can be, slightly tilted for MR, with any origin."""
    tilt = 0.0 if form.channels == ("CT",) else 0.1  # radians, about x
    turn = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array(form.spacing) * [-1, 1, 1])
    affine[:3, 3] = np.round(rng.uniform(-200, 200, 3), 1)
    return affine


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
