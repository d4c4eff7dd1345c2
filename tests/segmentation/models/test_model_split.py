# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A model is scored on the cases that its training held out."""

from __future__ import annotations

import pytest

from bundles.common.weights.checkpoint_file import save_atomically
from bundles.segmentation.models.model_record import model_split


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.pt"
    save_atomically({"model": {}, "trained": {"fold": 2, "folds": 4, "seed": 7, "steps": 10}}, path)
    return str(path)


def test_a_model_is_scored_on_the_cases_that_its_training_held_out(model, caplog):
    assert model_split(model, fold=None, folds=None, seed=None) == {"fold": 2, "folds": 4, "seed": 7}
    assert not caplog.records


def test_another_split_is_warned_of(model, caplog):
    assert model_split(model, fold=0, folds=None, seed=7) == {"fold": 0, "folds": 4, "seed": 7}
    assert "trained with fold 2; scored with 0" in caplog.text


def test_a_file_that_does_not_say_its_split_is_warned_of(tmp_path, caplog):
    save_atomically({"state_dict": {}}, tmp_path / "published.pt")
    split = model_split(str(tmp_path / "published.pt"), fold=None, folds=None, seed=None)
    assert split == {"fold": None, "folds": None, "seed": 0}
    assert "published.pt does not record which cases it was trained on" in caplog.text
