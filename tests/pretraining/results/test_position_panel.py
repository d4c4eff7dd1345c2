# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Whole scans are mapped by sliding windows, and the error is that of distances within a scan."""

from __future__ import annotations

import logging

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import Compose

from bundles.common.data.seeded_crops import SeededCrops
from bundles.pretraining.results.position_panel import PositionPanel, position_errors, position_figure

AFFINE = torch.tensor([[2.0, 0, 0, -30], [0, 2, 0, 100], [0, 0, 5, 7], [0, 0, 0, 1]], dtype=torch.float64)


class Knows(torch.nn.Module):
    """Reads the position in mm from three channels, off by a factor along z, and by a shift."""

    def __init__(self, stretch=1.0, shift=0.0):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.factor = torch.tensor([1.0, 1.0, stretch]).view(1, 3, 1, 1, 1)
        self.shift = shift

    def predict_positions(self, x):
        return x * self.factor + self.shift


def scan(shape=(20, 17, 9)):
    grid = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in shape), indexing="ij")
    voxels = torch.stack([*grid, torch.ones_like(grid[0])])
    return torch.einsum("ij,jxyz->ixyz", AFFINE, voxels)[:3].float()


def test_errors_are_by_axis_over_the_body_and_without_the_shift():
    true = scan()
    body = torch.zeros(1, *true.shape[1:], dtype=torch.bool)
    body[:, 4:12, 4:12, 2:7] = True
    error, positions, shifted = position_errors(true + 50, AFFINE, body)
    assert error == pytest.approx([0, 0, 0], abs=1e-3)
    torch.testing.assert_close(positions, true, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(shifted, true, atol=1e-3, rtol=1e-5)
    wrong = true.clone()
    wrong[2] *= 1.5
    z = true[2, 4:12, 4:12, 2:7]
    error, *_ = position_errors(wrong, AFFINE, body)
    assert error == pytest.approx([0, 0, float((0.5 * (z - z.mean())).abs().mean())], abs=1e-3)


def test_colours_are_red_to_the_right_green_to_the_front_and_blue_to_the_head():
    true = scan()
    body = torch.ones(1, *true.shape[1:], dtype=torch.bool)
    one = {"image": torch.rand(1, *true.shape[1:]), "true": true, "predicted": true, "body": body}
    figure = position_figure([{**one, "spacing": [2.0, 2.0, 5.0], "error": [1.2, 3.4, 5.6]}])
    assert len(figure.axes) == 6 and "error x 1, y 3, z 6 mm" in figure.axes[4].get_title()
    coronal = figure.axes[2].images[0].get_array()  # (Z, X, RGB)
    assert coronal.shape == (9, 20, 3)
    assert coronal[4, -1, 0] > coronal[4, 0, 0] and coronal[-1, 9, 2] > coronal[0, 9, 2]
    sagittal = figure.axes[3].images[0].get_array()  # (Z, Y, RGB)
    assert sagittal[4, -1, 1] > sagittal[4, 0, 1]


def panel(tmp_path, tasks, scans=2):
    volumes = [{"image": MetaTensor(scan() + 10 * i, affine=AFFINE)} for i in range(3)]
    dataset = SeededCrops(data=volumes, preprocessing=Compose([]), augmentation=Compose([]), seed=0, cache_num=0)
    handler = PositionPanel(
        dataset=dataset,
        network=Knows(stretch=1.2),
        tasks=tasks,
        folder=str(tmp_path),
        roi_size=(8, 8, 4),
        body_above=-1000.0,
        scans=scans,
    )
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.run([0], max_epochs=1)
    return engine.state.metrics


def test_the_picture_and_the_metrics_of_whole_scans_are_written(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        metrics = panel(tmp_path, ["position"])
    assert "positions on 2 whole scans are off by" in caplog.text and "x 0.0, y 0.0, z " in caplog.text
    assert (tmp_path / "panel_position.png").read_bytes().startswith(b"\x89PNG")
    z = 5.0 * torch.arange(9)
    expected = float((0.2 * (z - z.mean())).abs().mean())
    assert metrics["scan_position_mm_z"] == pytest.approx(expected, rel=1e-3)
    assert metrics["scan_position_mm_x"] == pytest.approx(0, abs=1e-3)
    assert metrics["scan_position_mm"] == pytest.approx(expected / 3, rel=1e-3)


@pytest.mark.parametrize(("tasks", "scans"), [(["rotation"], 2), (["position"], 0)])
def test_nothing_is_mapped_without_the_task_or_without_scans(tmp_path, tasks, scans):
    assert panel(tmp_path, tasks, scans) == {} and list(tmp_path.iterdir()) == []
