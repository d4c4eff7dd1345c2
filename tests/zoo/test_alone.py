# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""An unpacked package works alone, in a process that cannot import this project."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from zoo.pack import pack
from zoo.package.archive import extract_archive

from .conftest import ORGANS
from .own_process import python


@pytest.fixture
def unpacked(tmp_path, unbuilt, btcv_models, spleen_models):
    def make(name: str, task: str | None = None) -> Path:
        models = btcv_models if task is None else spleen_models
        package = pack(name, out=tmp_path / "out", task=task, models=models)
        return extract_archive(package.archive, tmp_path / "zoo")

    return make


@pytest.mark.parametrize(
    ("name", "task", "labels"), [("swin_unetr_btcv_seg", None, 14), ("swin_unetr_msd", "Task09_Spleen", 2)]
)
def test_it_segments_a_scan_as_it_lies(unpacked, scan, tmp_path, name, task, labels):
    folder = unpacked(name, task)
    words = [
        "--config_file",
        "configs/inference.json",
        "--dataset_dir",
        str(scan),
        "--output_dir",
        str(tmp_path / "masks"),
    ]
    output = python("-m", "monai.bundle", "run", *words, cwd=folder).stdout
    assert "trained with" not in output  # no setting differs from the training's
    original, mask = nib.load(scan), nib.load(tmp_path / "masks/scan_seg.nii.gz")
    assert mask.shape == original.shape
    np.testing.assert_allclose(mask.affine, original.affine, atol=1e-3)
    assert set(np.unique(mask.dataobj)) <= set(range(labels))
    assert (tmp_path / "masks/volumes.csv").is_file()
    assert not (folder / "output").exists()


LOAD = """
import os, sys, torch
from monai.bundle import load

folder = sys.argv[1]
stored = torch.load(f"{folder}/swin_unetr_btcv_seg/models/model.pt", weights_only=True)["model"]
options = {"bundle_dir": folder, "workflow_type": "inference", "key_in_ckpt": "model", "device": "cpu"}
for working_folder in (os.getcwd(), "/"):
    os.chdir(working_folder)
    network = load("swin_unetr_btcv_seg", **options)
    state = network.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    print("classes:", network.eval()(torch.zeros(1, 1, 64, 64, 32)).shape[1])
    options["args_file"] = {"bundle_root": f"{folder}/swin_unetr_btcv_seg"}  # outside the bundle's folder
assert not any(name.split(".")[0] in ("bundles", "zoo") for name in sys.modules)
"""


def test_monai_load_builds_its_network_with_its_weights_inside_the_folder_and_elsewhere(unpacked):
    folder = unpacked("swin_unetr_btcv_seg")
    lines = python("-c", LOAD, str(folder.parent), cwd=folder).stdout.splitlines()
    assert [line for line in lines if line.startswith("classes: ")] == [f"classes: {len(ORGANS)}"] * 2
