# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A file of weights can have hundreds of MB: a run opens it once."""

from __future__ import annotations

import os

import pytest

from .command_line import SMALL, run_bundle, succeed

RECORDER = """
import os, torch
load = torch.load
def recorded(path, *args, **options):
    with open(os.environ["OPENED"], "a") as file:
        print(path, file=file)
    return load(path, *args, **options)
torch.load = recorded
"""


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Names of the files that the processes of a test open with torch.load, and how often."""
    (tmp_path / "recorder").mkdir()
    (tmp_path / "recorder" / "sitecustomize.py").write_text(RECORDER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "recorder"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OPENED", str(tmp_path / "opened.txt"))

    def names() -> list[str]:
        paths = (tmp_path / "opened.txt").read_text().split("\n")[:-1]
        (tmp_path / "opened.txt").unlink()
        return sorted(os.path.basename(path) for path in paths)

    return names


def test_each_workflow_opens_a_file_of_weights_once(tmp_path, btcv, pretrained, segmenter, opened):
    model, window = segmenter / "models" / "model.pt", {"preset": "cpu", "roi_size": "[64,64,32]"}
    encoder = pretrained / "models" / "encoder.pt"
    train = {**SMALL, "depths": None, "roi_size": "[64,64,32]", "fold": "all", "dataset_dir": btcv}
    succeed(
        run_bundle("swin_unetr_btcv_seg", "train.yaml", pretrained_encoder=encoder, output_dir=tmp_path / "t", **train)
    )
    assert opened() == ["best.pt", "encoder.pt"]  # the best weights of this run become its model.pt
    evaluate = {"dataset_dir": btcv, "pretrained_model": model, "output_dir": tmp_path / "e", **window}
    succeed(run_bundle("swin_unetr_btcv_seg", "evaluate.yaml", **evaluate))
    assert opened() == ["model.pt"]
    infer = {
        "dataset_dir": btcv / "imagesTr" / "img0000.nii.gz",
        "pretrained_model": model,
        "output_dir": tmp_path / "i",
    }
    succeed(run_bundle("swin_unetr_btcv_seg", "inference.yaml", **infer, **window))
    assert opened() == ["model.pt"]
