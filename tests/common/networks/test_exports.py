# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Networks of every preset and task are exported with the logits of PyTorch, whichever axes a stage shifts along.

Two blocks a stage: the second one shifts. ROIs are those of the tables; the largest ones are replaced by smaller ones
whose stages shift along the same axes, since an export runs the network on the CPU.
"""

from __future__ import annotations

import io
from itertools import product

import onnxruntime
import pytest
import torch
import yaml
from monai.networks.nets.swin_unetr import get_window_size

from bundles.common.errors import InputError
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.segmentation.models import exported_program
from bundles.segmentation.models.exported_program import write_program
from zoo.package.bundle_files import BUNDLES

HEADS = {4: [1, 2, 4, 8], 7: [3, 6, 12, 24]}  # by window: the presets cpu and official
# ROI, window: small enough for a test
TESTED = {(64, 64, 32): (4, 7), (32, 64, 32): (4,), (64, 64, 64): (7,), (96, 96, 32): (7,), (32, 32, 64): (7,)}


def shifts(roi: tuple[int, ...], window: int) -> list[tuple[bool, ...]]:
    """Along which axes each stage shifts."""
    sizes = [tuple(size // 2**stage for size in roi) for stage in range(1, 5)]
    return [tuple(map(bool, get_window_size(size, (window,) * 3, (window // 2,) * 3)[1])) for size in sizes]


def tables() -> set[tuple[tuple[int, ...], int]]:
    """ROI and window of every task with the presets official and cpu."""
    found = set()
    for bundle in ("swin_unetr_btcv_seg", "swin_unetr_msd"):
        for row in yaml.safe_load((BUNDLES / bundle / "configs/tasks.yaml").read_text()).values():
            found |= {(tuple(row["roi_size"]), 7), (tuple(row["cpu"].get("roi_size", row["roi_size"])), 4)}
    return found


def build(window: int, **change) -> torch.nn.Module:
    torch.manual_seed(0)
    record = {"in_channels": 1, "feature_size": 12, "depths": [2, 2, 2, 2], "num_heads": HEADS[window]}
    record |= {"window_size": window, "patch_size": 2, "merging": "monai", "use_v2": False} | change
    return build_swin_unetr(record, out_channels=3).eval()


def test_every_stage_of_every_task_shifts_like_one_that_is_tested():
    patterns = {pattern for roi, windows in TESTED.items() for window in windows for pattern in shifts(roi, window)}
    wanted = {pattern for roi, window in tables() for pattern in shifts(roi, window)}
    assert wanted <= patterns and len(wanted) > 2


@pytest.mark.parametrize(
    ("roi", "window"), [pair for roi, windows in TESTED.items() for pair in product([roi], windows)]
)
def test_onnx_gives_the_logits_of_pytorch(roi, window):
    network = build(window)
    windows = torch.rand(2, 1, *roi, generator=torch.Generator().manual_seed(1))
    file = io.BytesIO()
    axes = {"image": {0: "batch"}, "pred": {0: "batch"}}
    names = {"input_names": ["image"], "output_names": ["pred"], "dynamic_axes": axes, "dynamo": False}
    with torch.no_grad():
        torch.onnx.export(network, (windows[:1],), file, **names)
        expected = network(windows)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["pred"], {"image": windows.numpy()})
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 < expected.abs().max()


@pytest.mark.parametrize(
    ("roi", "window", "change"), [((64, 64, 32), 7, {}), ((64, 64, 32), 4, {"use_v2": True, "merging": "legacy"})]
)
def test_a_program_is_written_beside_the_weights(tmp_path, roi, window, change):
    network = build(window, **change)
    path = write_program(network, path=str(tmp_path / "model.pt"), channels=1, roi_size=roi)
    windows = torch.rand(3, 1, *roi, generator=torch.Generator().manual_seed(1))
    program = torch.export.load(path).module()
    with torch.no_grad():
        assert path == tmp_path / "model.pt2" and (program(windows) - network(windows)).abs().max() < 1e-4


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_program, "TOLERANCE", -1.0)
    with pytest.raises(InputError, match="differs from the network by"):
        write_program(build(4), path=str(tmp_path / "model.pt"), channels=1, roi_size=(64, 64, 32))
    assert not list(tmp_path.iterdir())
