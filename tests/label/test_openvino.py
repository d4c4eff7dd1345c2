# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A server whose masks OpenVINO computes: the same mask, the conversion kept beside the weights and made once."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from .server import BTCV, PYTHON, Server, needs_monai_label, serve

pytestmark = needs_monai_label


@pytest.fixture(scope="module")
def openvino_server(tmp_path_factory, data, packages) -> Server:
    scans = sorted((data / "btcv/image").iterdir())
    folder = tmp_path_factory.mktemp("openvino")
    with serve(PYTHON, folder, packages=packages[:1], scans=scans, backend="openvino") as running:
        yield running


@pytest.fixture(scope="module")
def masks(tmp_path_factory, openvino_server) -> list[Path]:
    """Two masks of the same scan, one after the other."""
    folder = tmp_path_factory.mktemp("masks")
    return [openvino_server.infer(BTCV, "case_2", folder / f"{number}.nii.gz") for number in range(2)]


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_the_mask_is_that_of_pytorch(masks, server, tmp_path):
    expected = voxels(server.infer(BTCV, "case_2", tmp_path / "torch.nii.gz"))
    found = voxels(masks[0])
    assert len(np.unique(expected)) > 1
    assert found.shape == expected.shape and (found == expected).mean() >= 0.999


def test_openvino_computed_it_and_is_converted_once(masks, openvino_server):
    log = openvino_server.log.read_text()
    assert log.count("OpenVINO 2026") >= 1 and "PyTorch goes on" not in log
    assert log.count("; converted in ") == 1
    record = json.loads(next((openvino_server.models / BTCV / "models").glob("model.openvino_*.json")).read_text())
    assert len(record["files"]) == 2 and all(0 <= off <= 1e-3 for off in record["checked"].values())
    assert np.array_equal(voxels(masks[0]), voxels(masks[1]))


def test_weights_that_a_training_wrote_are_converted_anew(masks, openvino_server, data, tmp_path):
    """The next mask is that of the trained network, not of the one that was converted before."""
    for number in range(2):
        openvino_server.store_label(f"case_{number}", data / f"btcv/label/case_{number}.nii.gz")
    trained = openvino_server.train(BTCV, max_epochs=1, val_split=0.5)
    assert trained["status"] == "DONE", trained["details"]
    openvino_server.infer(BTCV, "case_2", tmp_path / "after.nii.gz")
    assert openvino_server.log.read_text().count("; converted in ") == 2
    assert "PyTorch goes on" not in openvino_server.log.read_text()
    state = torch.load(openvino_server.models / BTCV / "models/model.pt", weights_only=True)
    assert state["trained"]["data"] == "MONAI Label"
