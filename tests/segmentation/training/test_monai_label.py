# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Support for MONAI Label: strings in the items, detecting that it runs the training, replacing the served model."""

from __future__ import annotations

import sys
import types

import monai.transforms
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from bundles.segmentation.training import monai_label
from bundles.segmentation.training.monai_label import ReplaceModel, Spacingd, started_by_monai_label


@pytest.fixture
def item(tmp_path) -> dict:
    """A scan as MONAI Label loads it: the item also contains the file name as a string."""
    path = str(tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(9, 8, 7)), np.diag([1, 2, 3, 1])), path)
    load = Compose([LoadImaged("image", image_only=False), EnsureChannelFirstd("image")])
    return load({"image": path, "image_path": path, "model": "name", "device": "cpu"})


def test_texts_beside_the_image_pass_and_the_image_is_resampled_as_ever(item):
    ours = Spacingd("image", pixdim=(2, 2, 2), mode="bilinear")(item)
    assert {key: ours[key] for key in ("image_path", "model", "device")} == {
        key: item[key] for key in ("image_path", "model", "device")
    }
    alone = monai.transforms.Spacingd("image", pixdim=(2, 2, 2), mode="bilinear")({"image": item["image"]})["image"]
    assert ours["image"].shape == alone.shape == (1, 5, 8, 10)
    assert torch.equal(ours["image"], alone) and torch.equal(ours["image"].affine, alone.affine)


def test_monais_own_fails_on_them_or_this_class_can_go(item):
    with pytest.raises(AttributeError, match="'str' object has no attribute 'update'"):
        monai.transforms.Spacingd("image", pixdim=(2, 2, 2))(item)


def test_the_server_is_known_by_its_package_and_by_its_file_for_several_gpus(monkeypatch):
    assert not started_by_monai_label(["monai/bundle/__main__.py", "run", "--config_file", "configs/train.yaml"])
    assert started_by_monai_label(["run", "--config_file", "['b/configs/monailabel_train.json','b/multi_gpu.yaml']"])
    monkeypatch.setitem(sys.modules, "monailabel", types.ModuleType("monailabel"))
    assert started_by_monai_label([])


def test_the_result_is_served_and_the_first_model_stays(tmp_path):
    result, served = tmp_path / "output/models/model.pt", tmp_path / "models/model.pt"
    result.parent.mkdir(parents=True)
    served.parent.mkdir()
    served.write_bytes(b"shipped")
    for training in (b"first", b"second"):
        trainer = Engine(lambda engine, batch: None)
        ReplaceModel(result=str(result), served=str(served)).attach(trainer)
        result.write_bytes(training)
        trainer.run([0], max_epochs=1)
        assert served.read_bytes() == training
    assert served.with_name("shipped_model.pt").read_bytes() == b"shipped"
    assert sorted(path.name for path in served.parent.iterdir()) == ["model.pt", "shipped_model.pt"]
    served.write_bytes(b"of a newer package")
    for training in (b"third", b"fourth"):
        result.write_bytes(training)
        trainer.run([0], max_epochs=1)
        assert served.read_bytes() == training
    kept = {path.name: path.read_bytes() for path in served.parent.glob("shipped*")}
    assert kept == {"shipped_model.pt": b"shipped", "shipped_model_2.pt": b"of a newer package"}


def test_a_training_that_stops_early_serves_nothing(tmp_path):
    served = tmp_path / "models/model.pt"
    trainer = Engine(lambda engine, batch: engine.terminate(skip_completed=True))
    ReplaceModel(result=str(tmp_path / "result.pt"), served=str(served)).attach(trainer)
    trainer.run([0, 1], max_epochs=2)
    assert not served.parent.exists()


def test_other_ranks_leave_the_model_to_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(monai_label, "rank", lambda: 1)
    trainer = Engine(lambda engine, batch: None)
    ReplaceModel(result=str(tmp_path / "result.pt"), served=str(tmp_path / "models/model.pt")).attach(trainer)
    trainer.run([0], max_epochs=1)
    assert not (tmp_path / "models").exists()
