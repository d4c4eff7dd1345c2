# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The preset of a run on a trained model is the model's, unless another one is asked for."""

from __future__ import annotations

import pytest
import torch

from bundles.common.weights.recorded_preset import preset_of_run, recorded_training


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "presets.yaml"
    path.write_text("official: {overlap: 0.5}\ncpu: {overlap: 0.25}\n")
    return str(path)


@pytest.fixture
def model(tmp_path):
    def save(content):
        torch.save({"model": {"w": torch.zeros(1)}, **content}, tmp_path / "model.pt")
        return str(tmp_path / "model.pt")

    return save


@pytest.mark.parametrize(
    ("recorded", "asked", "used", "words"),
    [
        ("cpu", None, "cpu", None),
        ("cpu", "cpu", "cpu", None),
        ("cpu", "official", "official", "was trained with --preset cpu; this run uses official"),
        (
            None,
            None,
            "official",
            "does not record a preset of this bundle: values that it does not record are those of",
        ),
        (None, "cpu", "cpu", None),
        ("other", None, "official", "does not record a preset of this bundle"),
    ],
)
def test_the_models_preset_is_used(file, model, caplog, recorded, asked, used, words):
    path = model({} if recorded is None else {"trained": {"preset": recorded}})
    assert preset_of_run(preset=asked, checkpoint=path, file=file) == used
    assert (words in caplog.text) if words else not caplog.text


def test_a_model_that_does_not_exist_yet_is_no_warning(file, tmp_path, caplog):
    absent = str(tmp_path / "models" / "model.pt")
    assert preset_of_run(preset=None, checkpoint=absent, file=file) == "official" and not caplog.text
    assert recorded_training(absent) == recorded_training(None) == {}
