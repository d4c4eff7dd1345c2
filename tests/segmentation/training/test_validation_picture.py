# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The picture shows the first case of each validation, with prediction and truth as they are."""

from __future__ import annotations

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from bundles.segmentation.training import validation_picture
from bundles.segmentation.training.validation_picture import ValidationPicture


def item(name: str, prediction: int, truth: int) -> dict:
    def label_map(value: int) -> MetaTensor:
        return MetaTensor(torch.full((1, 4, 5, 6), float(value)))

    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    image = MetaTensor(torch.full((1, 4, 5, 6), 0.5), affine=affine, meta={"filename_or_obj": f"d/{name}.nii.gz"})
    return {"image": image, "pred": label_map(prediction), "label": label_map(truth)}


def test_it_draws_the_first_case_of_each_validation(tmp_path, monkeypatch):
    drawn = []
    real = validation_picture.overlay_figure

    def spy(image, prediction, **options):
        drawn.append((options["title"], np.unique(prediction).tolist(), np.unique(options["truth"]).tolist()))
        assert options["spacing"] == [2.0, 3.0, 4.0] and image.shape == prediction.shape == (4, 5, 6)
        return real(image, prediction, **options)

    monkeypatch.setattr(validation_picture, "overlay_figure", spy)
    evaluator = Engine(lambda engine, batch: setattr(engine.state, "output", [batch]) or [batch])
    path = tmp_path / "validation.png"
    ValidationPicture(labels={"0": "background", "1": "a", "2": "b"}, path=path, window=(0, 1)).attach(evaluator)
    evaluator.run([item("one", 1, 2), item("two", 0, 1)])
    first = path.read_bytes()
    evaluator.run([item("three", 2, 0), item("four", 1, 1)])
    assert drawn == [("validation case one", [1], [2]), ("validation case three", [2], [0])]
    assert first[:4] == b"\x89PNG" and path.read_bytes() != first


def test_only_rank_0_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(validation_picture, "rank", lambda: 1)
    evaluator = Engine(lambda engine, batch: [batch])
    ValidationPicture(labels={"1": "a"}, path=tmp_path / "validation.png", window=None).attach(evaluator)
    evaluator.run([item("one", 1, 1)])
    assert list(tmp_path.iterdir()) == []
