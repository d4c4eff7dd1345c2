# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Packed bundles train with the overrides that MONAI Label applies to train.json. Tests with a server: tests/label."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tools.synthetic_patient import draw_patient, render
from zoo.pack import pack
from zoo.package.archive import extract_archive, file_hash

from .own_process import python

# As in BundleTrainTask of MONAI Label 0.8.5.
LABEL = """
import json, os, sys, types

sys.modules["monailabel"] = types.ModuleType("monailabel")
import monai.bundle
from monai.bundle import ConfigParser

for bundle, model_filename, train, validation in json.loads(sys.argv[1]):
    config = ConfigParser()
    config.read_config(f"{bundle}/configs/train.json")
    config.config.update({"bundle_root": bundle})
    handlers = config.get("train#handlers", [])
    load_path = f"{bundle}/models/{model_filename}"
    loaders = [handler for handler in handlers if handler.get("_target_") == "CheckpointLoader"]
    if os.path.exists(load_path) and not loaders:
        model = {"load_path": load_path, "load_dict": {"model": "$@network"}, "strict": False}
        handlers.insert(0, {"_target_": "CheckpointLoader", **model})
    overrides = {"bundle_root": bundle, "train#trainer#max_epochs": 2, "train#dataset#data": train, "device": "cpu"}
    overrides |= {"train#handlers": handlers, "validate#dataset#data": validation}
    sys.path.insert(0, bundle)
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]
    files = {"meta_file": f"{bundle}/configs/metadata.json", "config_file": f"{bundle}/configs/train.json"}
    monai.bundle.run(run_id="run", init_id=None, final_id=None, **files, **overrides)
    sys.path.remove(bundle)
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[dict[str, str]]:
    """Three scans with labels, as in the datastore of a server."""
    folder = tmp_path_factory.mktemp("studies")
    listed = []
    for number in range(3):
        image, label, affine = render(draw_patient(number))
        files = {"image": folder / f"case_{number}.nii.gz", "label": folder / f"labels/final/case_{number}.nii.gz"}
        files["label"].parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(image, affine), files["image"])
        nib.save(nib.Nifti1Image((label == 1).astype(np.uint8), affine), files["label"])
        listed.append({key: str(path) for key, path in files.items()})
    return listed


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, btcv_models, spleen_models) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.pack.run_checks", lambda folder, names: iter(()))
        packages = [
            pack("swin_unetr_btcv_seg", out=folder, models=btcv_models),
            pack("swin_unetr_msd", task="Task09_Spleen", out=folder, models=spleen_models),
        ]
    return {package.name: extract_archive(package.archive, folder / "model") for package in packages}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, bundles, scans) -> dict[str, dict]:
    """Train both in one process: one starts from a model and validates, the other starts from scratch without."""
    btcv, spleen = bundles.values()
    shutil.copy(btcv / "models/model.pt", btcv / "models/chosen.pt")
    tasks = [(str(btcv), "chosen.pt", scans[:2], scans[2:]), (str(spleen), "none.pt", scans, [])]
    python("-c", LABEL, json.dumps(tasks), cwd=tmp_path_factory.mktemp("elsewhere"))
    return {name: torch.load(folder / "models/model.pt", weights_only=True) for name, folder in bundles.items()}


@pytest.mark.parametrize(
    ("name", "training", "validation", "steps"),
    [("swin_unetr_btcv_seg", 2, 1, 2), ("swin_unetr_msd_spleen", 3, 0, 4)],
)
def test_the_servers_scans_and_epochs_are_those_of_the_training(bundles, trained, name, training, validation, steps):
    recorded = trained[name]["trained"]
    assert (recorded["scans"]["number"], recorded["validation_scans"]["number"]) == (training, validation)
    assert recorded["plan"]["epochs"] == 2 and recorded["plan"]["steps"] == steps  # two scans per step
    assert recorded["data"] == "MONAI Label"
    assert (recorded["score"]["mean_dice"] is not None) == (validation > 0)


def test_it_starts_from_the_model_that_is_chosen_or_anew(bundles, trained):
    start = {name: content["trained"]["start"] for name, content in trained.items()}
    assert start["swin_unetr_btcv_seg"]["file"] == str(bundles["swin_unetr_btcv_seg"] / "models/chosen.pt")
    assert start["swin_unetr_msd_spleen"] is None
    # in both cases the network is that of the weights, not that of the preset
    assert [content["encoder"]["depths"] for content in trained.values()] == [[1, 1, 1, 1]] * 2


def test_the_result_is_served_and_what_was_shipped_stays(bundles, trained, btcv_models, spleen_models):
    for folder, models in zip(bundles.values(), (btcv_models, spleen_models), strict=True):
        served, result = folder / "models/model.pt", folder / "output/models/model.pt"
        assert file_hash(served, "sha256") == file_hash(result, "sha256")
        assert file_hash(folder / "models/shipped_model.pt", "sha256") == file_hash(models / "model.pt", "sha256")


def test_preprocessing_and_postprocessing_ask_for_the_image_alone(bundles):
    """MONAI Label passes no label, and treats keys that are allowed to be missing as present."""
    for folder in bundles.values():
        config = json.loads((folder / "configs/inference.json").read_text())
        steps = config["preprocessing"]["transforms"]
        assert {step["keys"] for step in steps} == {"image"}
        assert [step["_target_"] for step in steps if "Spacingd" in step["_target_"]] == [
            "scripts.segmentation.training.monai_label.Spacingd"
        ]
        assert config["postprocessing"]["transforms"][0]["_target_"].endswith("MaskOnScanGridd")
