# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Small weights in the form that a training writes, and a copy of the bundles to modify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
import yaml

from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.pretraining.network import OFFICIAL_HEADS, SwinPretrainer
from bundles.pretraining.proxy_tasks.tasks import PAPER_TASKS as TASKS
from tools.synthetic_patient import draw_patient, render
from zoo.package.bundle_files import BUNDLES

from ..conftest import TINY_ENCODER

ROWS = yaml.safe_load((BUNDLES / "swin_unetr_msd/configs/tasks.yaml").read_text())
ORGANS = json.loads((BUNDLES / "swin_unetr_btcv_seg/configs/metadata.json").read_text())["network_data_format"][
    "outputs"
]["pred"]["channel_def"]
KEPT = ("modality", "channels", "labels", "spacing", "roi_size", "foreground", "nsd_tolerance", "hu_window")


def trained_row(task: str, **change: Any) -> dict[str, Any]:
    """The row that a training with the ``cpu`` preset saves with its weights."""
    row = {"hu_window": None, **ROWS[task], **ROWS[task]["cpu"], **change}
    return {key: row[key] for key in KEPT}


def save_btcv(folder: Path, *, labels: dict[str, str] = ORGANS, **trained: Any) -> Path:
    torch.manual_seed(0)
    settings = {"preset": "cpu", "spacing": [4.0, 4.0, 5.0], "hu_window": [-175.0, 250.0], "roi_size": [64, 64, 32]}
    moved = {"median_cosine": {"swinViT": 0.8623, "rest": 0.4882}}
    content = {
        "encoder": TINY_ENCODER,
        "labels": labels,
        "trained": settings | {"steps": 7, "score": {"mean_dice": 0.25}, "moved": moved} | trained,
    }
    save_atomically(
        {"model": build_swin_unetr(TINY_ENCODER, out_channels=len(labels)).state_dict(), **content}, folder / "model.pt"
    )
    return folder


def save_task(folder: Path, task: str, **change: Any) -> Path:
    torch.manual_seed(0)
    row = trained_row(task, **change)
    encoder = TINY_ENCODER | {"in_channels": len(row["channels"])}
    network = build_swin_unetr(encoder, out_channels=len(row["labels"]))
    settings = {"preset": "cpu", **{key: row[key] for key in ("spacing", "hu_window", "roi_size")}}
    content = {"encoder": encoder, "labels": row["labels"], "task": task, "row": row, "trained": settings}
    save_atomically({"model": network.state_dict(), **content}, folder / "model.pt")
    return folder


def save_pretrained(folder: Path) -> Path:
    torch.manual_seed(0)
    state = SwinPretrainer(encoder=TINY_ENCODER, tasks=TASKS).state_dict()
    trained = {"preset": "cpu", "spacing": [4.0, 4.0, 5.0], "roi_size": [64, 64, 32], "seed": 0}
    content = {"encoder": TINY_ENCODER, "heads": dict(OFFICIAL_HEADS), "tasks": list(TASKS), "trained": trained}
    save_atomically({"model": state, **content}, folder / "model.pt")
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("swinViT.")}
    save_atomically({"state_dict": encoder, "encoder": TINY_ENCODER, "trained": trained}, folder / "encoder.pt")
    return folder


@pytest.fixture(scope="session")
def btcv_models(tmp_path_factory) -> Path:
    return save_btcv(tmp_path_factory.mktemp("btcv_models"))


@pytest.fixture(scope="session")
def spleen_models(tmp_path_factory) -> Path:
    return save_task(tmp_path_factory.mktemp("spleen_models"), "Task09_Spleen")


@pytest.fixture(scope="session")
def pretrained_models(tmp_path_factory) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("pretrained_models"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    """A scan of a synthetic patient."""
    image, _, affine = render(draw_patient(0))
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(image, affine), path)
    return path


@pytest.fixture
def tree(tmp_path) -> Path:
    """A modifiable copy of the folder of all bundles, with its links."""

    def no_weights(folder: str, names: list[str]) -> list[str]:
        left_by_runs = {"models", "output", "data"} if "LICENSE" in names else set()
        return [name for name in names if name in left_by_runs | {"__pycache__"}]

    return Path(shutil.copytree(BUNDLES, tmp_path / "tree" / "bundles", symlinks=True, ignore=no_weights))


@pytest.fixture
def unbuilt(monkeypatch) -> None:
    """Pack without building the network in a separate process, for tests that only need the files."""
    monkeypatch.setattr("zoo.pack.run_checks", lambda folder, names: iter(()))
