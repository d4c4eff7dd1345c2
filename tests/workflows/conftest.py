# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Small data sets and trained networks shared by the workflow tests, each made once per worker."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tools.synthetic_patient import ORGANS, draw_patient, render

from .command_line import SMALL, run_bundle, succeed

pytest.register_assert_rewrite("tests.workflows.decathlon_runs")  # its checks show values when they fail


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return f"./{path.relative_to(path.parents[1])}"


def write_list(folder: Path, labels: dict[str, str], modality: dict[str, str], **sections: list[dict]) -> Path:
    content = {"name": folder.name, "labels": labels, "modality": modality, **sections}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def patients() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Three synthetic patients: image, label, affine."""
    return [render(draw_patient(seed)) for seed in range(3)]


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory, patients) -> Path:
    """CTs without labels and without a data list, in nested folders."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for number, (image, _, affine) in enumerate(patients):
        save(image, affine, folder / f"site {number}" / "scan.nii.gz")
    return folder


@pytest.fixture(scope="session")
def btcv(tmp_path_factory, patients) -> Path:
    """Two training cases, one validation case and one test case in the layout of BTCV."""
    folder = tmp_path_factory.mktemp("btcv")
    cases = [
        {
            "image": save(image, affine, folder / "imagesTr" / f"img{number:04d}.nii.gz"),
            "label": save(label, affine, folder / "labelsTr" / f"label{number:04d}.nii.gz"),
        }
        for number, (image, label, affine) in enumerate(patients)
    ]
    labels = {"0": "background"} | {str(value): name for value, name in ORGANS.items()}
    return write_list(folder, labels, {"0": "CT"}, training=cases[:2], validation=cases[2:], test=cases[2:])


@pytest.fixture(scope="session")
def spleen(tmp_path_factory, patients) -> Path:
    """A small Task09_Spleen: five cases without a validation section, as shipped by MSD."""
    folder = tmp_path_factory.mktemp("Task09_Spleen")
    cases = []
    for number in range(5):
        image, label, affine = patients[number % len(patients)]
        name = f"spleen_{number}.nii.gz"
        cases.append(
            {
                "image": save(image + np.int16(number), affine, folder / "imagesTr" / name),
                "label": save((label == 1).astype(np.uint8), affine, folder / "labelsTr" / name),
            }
        )
    return write_list(
        folder, {"0": "background", "1": "spleen"}, {"0": "CT"}, training=cases, test=["./imagesTr/spleen_0.nii.gz"]
    )


@pytest.fixture(scope="session")
def brain(tmp_path_factory) -> Path:
    """A small Task01_BrainTumour: four channels along the fourth axis of the file."""
    folder = tmp_path_factory.mktemp("Task01_BrainTumour")
    generator = np.random.default_rng(0)
    cases = []
    for number in range(5):
        image = generator.gamma(2, 100, (60, 60, 40, 4)).astype(np.float32)
        label = generator.integers(0, 4, (60, 60, 40)).astype(np.uint8)
        cases.append(
            {
                "image": save(image, np.diag([3.0, 3, 3, 1]), folder / "imagesTr" / f"BRATS_{number}.nii.gz"),
                "label": save(label, np.diag([3.0, 3, 3, 1]), folder / "labelsTr" / f"BRATS_{number}.nii.gz"),
            }
        )
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    return write_list(folder, labels, {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, training=cases)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, unlabelled) -> Path:
    """Output folder of a small pre-training, run from inside the bundle's folder."""
    output = tmp_path_factory.mktemp("pretrained")
    options = {**SMALL, "roi_size": "[64,64,32]"}
    succeed(run_bundle("swin_unetr_pretrain", "train.yaml", dataset_dir=unlabelled, output_dir=output, **options))
    return output


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory, btcv, pretrained) -> Path:
    """Output folder of a small BTCV fine-tuning from the encoder."""
    output = tmp_path_factory.mktemp("segmenter")
    options = {**SMALL, "depths": None, "roi_size": "[64,64,32]"}  # None: as in the encoder
    succeed(
        run_bundle(
            "swin_unetr_btcv_seg",
            "train.yaml",
            dataset_dir=btcv,
            output_dir=output,
            pretrained_encoder=pretrained / "models" / "encoder.pt",
            **options,
        )
    )
    return output
