# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Packed bundles in a real MONAI Label server: two models at once, masks, corrected labels, training.

``make test-label`` sets up the environment of the server; without it the tests are skipped. Like the work of an
annotator, the tests depend on the previous ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from tools.synthetic_patient import ORGANS

from ..workflows.command_line import succeed
from .server import BTCV, SPLEEN, needs_monai_label

pytestmark = needs_monai_label


@pytest.fixture(scope="module")
def first_masks(tmp_path_factory, server) -> dict[str, Path]:
    """Masks of the same scan by one model and then by the other."""
    folder = tmp_path_factory.mktemp("first")
    return {model: server.infer(model, "case_2", folder / f"{model}.nii.gz") for model in (BTCV, SPLEEN)}


@pytest.fixture(scope="module")
def trained(server, first_masks, data) -> dict:
    """Train one epoch on two corrected labels, after the first masks."""
    for number in range(2):
        server.store_label(f"case_{number}", data / f"btcv/label/case_{number}.nii.gz")
    return server.train(BTCV, max_epochs=1, val_split=0.5, tracking="mlflow")


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_both_models_are_listed_with_their_labels(server):
    models = server.info()["models"]
    assert models[BTCV]["labels"] == {name: value for value, name in ORGANS.items()}
    assert models[SPLEEN]["labels"] == {"spleen": 1}
    assert {models[name]["type"] for name in (BTCV, SPLEEN)} == {"segmentation"}
    assert set(server.info()["trainers"]) == {BTCV, SPLEEN}


@pytest.mark.parametrize("model", [BTCV, SPLEEN])
def test_a_mask_is_that_of_the_bundle_on_every_voxel(server, first_masks, data, tmp_path, model):
    scan = data / "btcv/image/case_2.nii.gz"
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    command += ["--dataset_dir", str(scan), "--output_dir", str(tmp_path)]
    succeed(subprocess.run(command, cwd=server.models / model, capture_output=True, text=True, timeout=600))
    expected, served = nib.load(tmp_path / "case_2_seg.nii.gz"), nib.load(first_masks[model])
    assert served.shape == expected.shape == nib.load(scan).shape
    np.testing.assert_allclose(served.affine, expected.affine, atol=1e-3)
    assert np.array_equal(voxels(first_masks[model]), np.asarray(expected.dataobj))
    assert len(np.unique(expected.dataobj)) > 1


def test_the_first_model_again_after_the_second(server, first_masks, tmp_path):
    again = server.infer(BTCV, "case_2", tmp_path / "again.nii.gz")
    assert np.array_equal(voxels(again), voxels(first_masks[BTCV]))


def test_an_epoch_is_a_pass_over_the_corrected_labels_from_the_served_model(server, trained):
    assert trained["status"] == "DONE", trained["details"]
    content = torch.load(server.models / BTCV / "models/model.pt", weights_only=True)
    recorded = content["trained"]
    assert recorded["data"] == "MONAI Label" and recorded["start"]["file"] == str(
        server.models / BTCV / "models/model.pt"
    )
    plan = {"steps": 1, "epochs": 1, "warmup_steps": 0, "new_parts_steps": 0, "epoch_length": 1, "iterations": 1}
    assert recorded["plan"] == plan
    assert recorded["scans"]["number"] == recorded["validation_scans"]["number"] == 1


def test_the_first_model_stays_beside_the_new_one(server, trained, packages, tmp_path):
    folder = server.models / BTCV / "models"
    content = {name: torch.load(folder / name, weights_only=True)["model"] for name in ("model.pt", "shipped_model.pt")}
    weight = "out.conv.conv.weight"
    assert not torch.equal(content["model.pt"][weight], content["shipped_model.pt"][weight])
    with ZipFile(packages[0]) as package:
        assert (folder / "shipped_model.pt").read_bytes() == package.read(f"{BTCV}/models/model.pt")


def test_masks_after_the_training_are_the_new_models(server, trained, first_masks, tmp_path):
    new = voxels(server.infer(BTCV, "case_2", tmp_path / "new.nii.gz"))
    assert np.count_nonzero(new != voxels(first_masks[BTCV])) > 100
    shipped = server.infer(BTCV, "case_2", tmp_path / "shipped.nii.gz", model_filename="shipped_model.pt")
    assert np.array_equal(voxels(shipped), voxels(first_masks[BTCV]))
    second = server.infer(SPLEEN, "case_2", tmp_path / "second.nii.gz")
    assert np.array_equal(voxels(second), voxels(first_masks[SPLEEN]))
    assert np.array_equal(voxels(server.infer(BTCV, "case_2", tmp_path / "last.nii.gz")), new)


def test_mlflow_has_the_training(server, trained, monkeypatch):
    output = server.models / BTCV / "output"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MONAI 1.5 tracks in files, 1.6 in a database
    store = f"sqlite:///{output / 'mlruns.db'}" if (output / "mlruns.db").exists() else (output / "mlruns").as_uri()
    client = MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name(BTCV).experiment_id])
    assert run.info.status == "FINISHED"
    assert {"train/loss", "validation/mean_dice"} <= set(run.data.metrics)


def test_labels_of_another_model_are_refused_with_the_reason(server, trained):
    """The stored labels have thirteen organs, this model has one."""
    task = server.train(SPLEEN, max_epochs=1, val_split=0)
    assert task["status"] == "ERROR"
    details = "\n".join(task["details"])
    assert "2 of 2 scans are bad" in details and "case_0.nii.gz" in details
    assert not (server.models / SPLEEN / "models/shipped_model.pt").exists()
