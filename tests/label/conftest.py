# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Scans, and two bundles that were trained on them and packed: what each server of these tests gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools.synthetic_patient import ORGANS, draw_patient, render
from zoo.pack import pack

from ..workflows.command_line import run_bundle, succeed
from ..workflows.conftest import save, write_list
from .server import BTCV, PYTHON, Server, serve

TRAINING = {"preset": "cpu", "depths": "[1,1,1,1]", "max_steps": 12, "val_interval": 12, "warmup_steps": 2}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Folders ``btcv`` and ``Task09_Spleen`` with the same three synthetic patients."""
    folder = tmp_path_factory.mktemp("data")
    cases: dict[str, list[dict[str, str]]] = {"btcv": [], "Task09_Spleen": []}
    for number in range(3):
        image, label, affine = render(draw_patient(number))
        for task, voxels in (("btcv", label), ("Task09_Spleen", (label == 1).astype(np.uint8))):
            files = {"image": image, "label": voxels}
            cases[task].append(
                {
                    key: save(array, affine, folder / task / key / f"case_{number}.nii.gz")
                    for key, array in files.items()
                }
            )
    organs = {"0": "background"} | {str(value): name for value, name in ORGANS.items()}
    for task, labels in (("btcv", organs), ("Task09_Spleen", {"0": "background", "1": "spleen"})):
        write_list(folder / task, labels, {"0": "CT"}, training=cases[task][:2], validation=cases[task][2:])
    return folder


@pytest.fixture(scope="session")
def packages(tmp_path_factory, data) -> list[Path]:
    """Both bundles, trained for a few steps and packed: BTCV's organs, and the spleen alone."""
    folder = tmp_path_factory.mktemp("packages")
    made = []
    for bundle, task, cases in ((BTCV, None, "btcv"), ("swin_unetr_msd", "Task09_Spleen", "Task09_Spleen")):
        options = TRAINING | {"dataset_dir": data / cases, "output_dir": folder / bundle}
        options |= {"task": task} if task else {}
        succeed(run_bundle(bundle, "train.yaml", **options))
        made.append(pack(bundle, task=task, models=folder / bundle / "models", out=folder).archive)
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory, data, packages) -> Server:
    """A server of both bundles with the scans of BTCV, one for each module of tests."""
    scans = sorted((data / "btcv/image").iterdir())
    with serve(PYTHON, tmp_path_factory.mktemp("server"), packages=packages, scans=scans) as running:
        yield running
