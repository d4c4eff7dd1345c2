# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The pictures show the right crops, say the right angles and outline the right partners."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.colors import to_rgba

from bundles.pretraining.results.proxy_panel import ProxyPanels, contrast_figure, inpainting_figure, rotation_figure


def test_inpainting_shows_crop_view_what_is_restored_and_reconstruction_per_row():
    target, view, reconstruction = (torch.rand(2, 1, 4, 5, 6) for _ in range(3))
    mask = torch.rand(2, 1, 4, 5, 6) < 0.5
    figure = inpainting_figure(target, view, reconstruction, mask)
    restored = np.where(mask, reconstruction, view)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 8
    for row in range(2):
        for column, volumes in enumerate((target, view, restored, reconstruction)):
            # middle axial slice, anterior at the top with origin below
            assert np.array_equal(shown[4 * row + column], np.asarray(volumes)[row, 0, :, :, 3].T)
    titles = ["crop", "masked view", "restored", "whole reconstruction"]
    assert [axes.get_title() for axes in figure.axes[:4]] == titles


def test_rotation_says_true_and_predicted_angle_in_green_or_red():
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    for turns in (torch.tensor([1, 2]), [1, 2]):
        figure = rotation_figure(torch.rand(2, 1, 4, 4, 4), turns, logits)
        assert [axes.get_title() for axes in figure.axes] == [
            "true 90°\npredicted 90° (100%)",
            "true 180°\npredicted 270° (100%)",
        ]
        assert [to_rgba(axes.title.get_color()) for axes in figure.axes] == [to_rgba("tab:green"), to_rgba("tab:red")]


def test_contrast_shows_the_cosine_similarity_and_outlines_partners():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, -1.0]])
    figure = contrast_figure(torch.rand(2, 1, 4, 4, 4), torch.rand(2, 1, 4, 4, 4), embeddings)
    (matrix,) = [axes for axes in figure.axes if len(axes.patches) == 4]
    half = 0.5**0.5
    expected = [[1, 0, half, 0], [0, 1, half, -1], [half, half, 1, -half], [0, -1, -half, 1]]
    assert np.allclose(matrix.images[0].get_array(), expected, atol=1e-6)
    outlined = {(patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in matrix.patches}
    assert outlined == {(0, 2), (1, 3), (2, 0), (3, 1)}
    assert [axes.get_title() for axes in figure.axes[:4]] == ["A1", "B1", "A2", "B2"]


def draw(folder, tasks, crops=4, batches=1, rank=0):
    pred = {"inpainting": torch.rand(4, 1, 4, 4, 4), "rotation": torch.randn(4, 4), "contrast": torch.randn(4, 8)}
    label = {
        "crop": torch.rand(4, 1, 4, 4, 4),
        "mask": torch.rand(4, 1, 4, 4, 4) < 0.5,
        "turns": torch.tensor([0, 1, 2, 3]),
    }
    output = {"image": torch.rand(4, 1, 4, 4, 4), "pred": {task: pred[task] for task in tasks}, "label": label}
    engine = Engine(lambda engine, batch: output)
    panels = ProxyPanels(folder=str(folder), crops=crops)
    panels.attach(engine)
    engine.run([0] * batches)
    return panels, engine


@pytest.mark.parametrize("tasks", [["inpainting", "rotation", "contrast"], ["rotation"]])
def test_a_picture_per_task_in_use_is_written(tmp_path, tasks):
    draw(tmp_path / "new", tasks)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(f"panel_{task}.png" for task in tasks)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "new").iterdir())


def test_the_first_batch_of_every_validation_is_drawn(tmp_path, monkeypatch):
    drawn = []

    def figure(view, turns, logits):
        drawn.append(len(view))
        return SimpleNamespace(savefig=lambda path, dpi: path.write_text("picture"))

    monkeypatch.setattr("bundles.pretraining.results.proxy_panel.rotation_figure", figure)
    _, engine = draw(tmp_path, ["rotation"], crops=1, batches=3)
    assert drawn == [2]
    engine.run([0, 0], max_epochs=1)
    assert drawn == [2, 2]


def test_only_rank_0_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("bundles.pretraining.results.proxy_panel.rank", lambda: 1)
    draw(tmp_path, ["rotation"])
    assert list(tmp_path.iterdir()) == []
