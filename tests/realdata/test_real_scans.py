# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The whole workflow on a little real CT: pre-train on two unlabelled sets, fine-tune on one labelled case, segment.

The data are in the folder REALDATA, by default ``shared/data`` next to the project; docs/how-to/real-scans.md describes
them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy.stats import binomtest

from bundles.common.training.log import read_log
from bundles.segmentation.inference.mask_on_scan_grid import MaskOnScanGridd

from ..workflows.command_line import BUNDLES, ROOT, run_bundle, succeed

DATA = Path(os.environ.get("REALDATA", ROOT.parent / "shared" / "data"))
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "openkbp").is_dir(), reason="no real scans here: set REALDATA"),
]
QUICK = {"preset": "cpu", "log_every": 1}


def falls(log: Path, name: str, steps: int = 8) -> bool:
    values = [row[name] for row in read_log(log)]
    return np.mean(values[-steps:]) < np.mean(values[:steps])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrain")
    sources = [str(DATA / "openkbp"), str(DATA / "ct_unlabelled")]
    run = run_bundle(
        "swin_unetr_pretrain",
        "train.yaml",
        dataset_dir=repr(sources),
        output_dir=output,
        max_steps=30,
        cache_num=0,
        **QUICK,
    )
    succeed(run)
    return output / "models" / "encoder.pt"


@pytest.fixture(scope="module")
def model(tmp_path_factory, encoder):
    output = tmp_path_factory.mktemp("finetune")
    run = run_bundle(
        "swin_unetr_btcv_seg",
        "train.yaml",
        dataset_dir=DATA / "abdomen_ct",
        fold="all",
        pretrained_encoder=encoder,
        output_dir=output,
        max_steps=40,
        **QUICK,
    )
    succeed(run)
    return output / "models" / "model.pt"


def test_pre_training_losses_fall(encoder):
    log = encoder.parents[1] / "training_log.csv"
    assert falls(log, "loss")
    assert falls(log, "loss_inpainting")


def test_all_three_tasks_are_learnt_from_real_scans(tmp_path):
    """Rotation is better than chance after 100 to 300 steps (docs/explanation/measured.md)."""
    succeed(
        run_bundle(
            "swin_unetr_pretrain",
            "train.yaml",
            dataset_dir=DATA / "openkbp",
            output_dir=tmp_path,
            max_steps=100,
            val_interval=100,
            validation_draws=1,  # the views of several draws from a scan are not independent
            **QUICK,
        )
    )
    for task in ("inpainting", "contrast", "rotation"):
        assert falls(tmp_path / "training_log.csv", f"loss_{task}", steps=20), task
    report = json.loads((tmp_path / "validation.json").read_text())
    right = round(report["rotation_accuracy"] * report["views"])
    assert report["views"] == 128
    assert binomtest(right, report["views"], 0.25, alternative="greater").pvalue < 0.001


def test_fine_tuning_losses_fall(model):
    log = model.parents[1] / "training_log.csv"
    assert falls(log, "loss")
    assert falls(log, "loss_dice")


def test_masks_have_their_scans_geometry_and_declared_labels(tmp_path, model):
    source = DATA / "ct_unlabelled" / "imagesTr"
    succeed(
        run_bundle(
            "swin_unetr_btcv_seg",
            "inference.yaml",
            dataset_dir=source,
            pretrained_model=model,
            output_dir=tmp_path,
            preset="cpu",
        )
    )
    scans = sorted(source.glob("*.nii.gz"))
    assert len(scans) == 2
    for scan in scans:
        original, mask = nib.load(scan), nib.load(tmp_path / scan.name.replace(".nii.gz", "_seg.nii.gz"))
        assert mask.shape == original.shape
        np.testing.assert_allclose(mask.affine, original.affine, atol=1e-3)
        labels = set(np.unique(mask.dataobj).tolist())
        assert labels <= set(range(14))
        assert len(labels) > 1  # not only background


def test_a_real_label_goes_through_the_preprocessing_and_back(monkeypatch):
    """Organs of 4 ml and more on a 3 mm grid, by nearest-neighbour interpolation and as probabilities."""
    monkeypatch.syspath_prepend(str(BUNDLES / "swin_unetr_btcv_seg"))
    config = ConfigParser()
    config.read_config(BUNDLES / "swin_unetr_btcv_seg" / "configs" / "train.yaml")
    config["bundle_root"] = str(BUNDLES / "swin_unetr_btcv_seg")
    preprocessing = config.get_parsed_content("preprocessing")
    for module in [module for module in sys.modules if module.split(".")[0] == "scripts"]:
        monkeypatch.delitem(sys.modules, module)
    (scan,) = json.loads((DATA / "abdomen_ct" / "dataset.json").read_text())["training"]
    files = {key: str(DATA / "abdomen_ct" / scan[key]) for key in ("image", "label")}
    item = preprocessing(files)
    indicator = torch.nn.functional.one_hot(item["label"][0].as_tensor().long(), 14).movedim(-1, 0).float()
    truth = np.asarray(nib.load(files["label"]).dataobj)
    for mode in ("nearest", "linear"):
        back = MaskOnScanGridd("pred", mode=mode)({**item, "pred": indicator})["pred"][0].numpy()
        for value in set(np.unique(truth)) - {0}:
            both, one, other = (
                np.count_nonzero(a) for a in ((back == value) & (truth == value), back == value, truth == value)
            )
            assert 2 * both / (one + other) > 0.97
