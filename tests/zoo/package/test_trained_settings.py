# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A packed bundle runs with the settings that its weights were trained with."""

from __future__ import annotations

import pytest
from monai.bundle import ConfigParser

from zoo.pack import stage
from zoo.package.bundle_files import BUNDLES

from ..conftest import save_btcv

SOURCE = BUNDLES / "swin_unetr_btcv_seg" / "configs"


def changed(folder, name: str) -> dict:
    """Entries of a config that the package has otherwise than the repository."""
    old, new = (
        ConfigParser.load_config_file(str(configs / f"{name}.yaml")) for configs in (SOURCE, folder / "configs")
    )
    assert old.keys() == new.keys()
    return {key: new[key] for key in new if new[key] != old[key]}


def staged(tmp_path, **trained):
    return stage("swin_unetr_btcv_seg", folder=tmp_path / "s", models=save_btcv(tmp_path / "m", **trained))


def test_the_preset_of_the_training_is_the_default_and_the_network_of_the_weights_is_trained_on(tmp_path):
    folder = staged(tmp_path)
    assert changed(folder, "inference") == changed(folder, "evaluate") == {"preset": "cpu"}
    assert changed(folder, "train") == {"preset": "cpu", "depths": [1, 1, 1, 1]}  # else as the preset


def test_options_of_the_training_are_defaults_too(tmp_path):
    folder = staged(tmp_path, spacing=[3.0, 3.0, 3.0], hu_window=[-100.0, 200.0])
    expected = {"preset": "cpu", "spacing": [3.0, 3.0, 3.0], "hu_window": [-100.0, 200.0]}
    assert changed(folder, "inference") == changed(folder, "evaluate") == expected
    assert changed(folder, "train") == {**expected, "depths": [1, 1, 1, 1]}


@pytest.mark.parametrize("preset", [None, "of another version"])
def test_weights_that_do_not_name_a_preset_state_every_difference_from_the_first(tmp_path, preset):
    expected = {"spacing": [4.0, 4.0, 5.0], "roi_size": [64, 64, 32]}
    assert changed(staged(tmp_path, preset=preset), "inference") == expected


def test_comments_stay(tmp_path):
    text = (staged(tmp_path, spacing=[3.0, 3.0, 3.0]) / "configs" / "inference.yaml").read_text()
    assert "spacing: [3.0, 3.0, 3.0]  # mm\n" in text
    assert text.count("#") == (SOURCE / "inference.yaml").read_text().count("#")
