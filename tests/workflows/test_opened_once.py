# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A run opens a file of weights once, decodes a scan once and reads a DICOM header once: each takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.common.scans.dicom_files import write_series

from .command_line import SMALL, run_bundle, succeed

RECORDER = """
import os, pydicom, torch
from nibabel.arrayproxy import ArrayProxy
def record(path):
    with open(os.environ["OPENED"], "a") as file:
        print(path, file=file)
load, decode, dcmread = torch.load, ArrayProxy._get_unscaled, pydicom.dcmread
def recorded_load(path, *args, **options):
    record(path)
    return load(path, *args, **options)
def recorded_decode(proxy, slicer):
    record(proxy.file_like)
    return decode(proxy, slicer)
def recorded_dcmread(path, *args, **options):
    if options.get("stop_before_pixels"):
        record(path)
    return dcmread(path, *args, **options)
torch.load, ArrayProxy._get_unscaled, pydicom.dcmread = recorded_load, recorded_decode, recorded_dcmread
"""


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Names of the weights, scans and DICOM headers that the processes of a test read, as often as they do."""
    (tmp_path / "recorder").mkdir()
    (tmp_path / "recorder" / "sitecustomize.py").write_text(RECORDER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "recorder"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OPENED", str(tmp_path / "opened.txt"))

    def names(suffix: str) -> list[str]:
        paths = Path(os.environ["OPENED"]).read_text().split("\n")[:-1]
        return sorted(os.path.basename(path) for path in paths if path.endswith(suffix))

    return names


def test_each_workflow_opens_weights_scans_and_headers_once(
    tmp_path, btcv, pretrained, segmenter, patients, opened, monkeypatch
):
    model, window = segmenter / "models" / "model.pt", {"preset": "cpu", "roi_size": "[64,64,32]"}
    encoder = pretrained / "models" / "encoder.pt"
    train = {**SMALL, "depths": None, "roi_size": "[64,64,32]", "fold": "all", "dataset_dir": btcv}
    succeed(
        run_bundle("swin_unetr_btcv_seg", "train.yaml", pretrained_encoder=encoder, output_dir=tmp_path / "t", **train)
    )
    assert opened(".pt") == ["best.pt", "encoder.pt"]  # the best weights of this run become its model.pt

    monkeypatch.setenv("OPENED", str(tmp_path / "evaluate.txt"))
    evaluate = {"dataset_dir": btcv, "pretrained_model": model, "output_dir": tmp_path / "e", **window}
    succeed(run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", **evaluate))
    assert opened(".pt") == ["model.pt"]
    (image,), (label,) = ({one for one in opened(".nii.gz") if one.startswith(kind)} for kind in ("img", "label"))
    assert opened(".nii.gz") == [image, label]

    monkeypatch.setenv("OPENED", str(tmp_path / "inference.txt"))
    slices = write_series(tmp_path / "study", np.asarray(patients[2][0], np.int16), spacing=(3, 3, 3), intercept=0.0)
    scans = f"['{tmp_path / 'study'}','{btcv / 'imagesTr' / 'img0000.nii.gz'}']"
    infer = {"dataset_dir": scans, "pretrained_model": model, "output_dir": tmp_path / "i"}
    succeed(run_bundle("swin_unetr_btcv_seg", "inference.yaml", **infer, **window))
    assert opened(".pt") == ["model.pt"]
    assert opened(".dcm") == sorted(file.name for file in slices)
    (converted,) = (tmp_path / "i" / "dicom").iterdir()
    assert opened(".nii.gz") == sorted(["img0000.nii.gz", converted.name])
    assert len(list((tmp_path / "i").glob("*_overlay.png"))) == 2 and len(list((tmp_path / "i").glob("*_seg.dcm"))) == 1
