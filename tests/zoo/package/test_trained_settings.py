# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A packed bundle uses the settings that its weights were trained with."""

from __future__ import annotations

import pytest
from monai.bundle import ConfigParser

from bundles.segmentation.tasks.tasks import choose_task
from zoo.pack import stage
from zoo.package.bundle_files import BUNDLES

from ..conftest import save_btcv

SOURCE = BUNDLES / "swin_unetr_btcv_seg" / "configs"


def changed(folder, name: str) -> dict:
    """Entries of a config that differ between the package and the repository."""
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
    assert changed(folder, "train") == {"preset": "cpu", "depths": [1, 1, 1, 1]}  # everything else as in the preset


def row_of(folder, preset: str) -> dict:
    return choose_task(task=None, file=str(folder / "configs" / "tasks.yaml"), preset=preset)


def test_options_of_the_training_are_those_of_the_row(tmp_path):
    folder = staged(tmp_path, spacing=[3.0, 3.0, 3.0], hu_window=[-100.0, 200.0])
    before, after = row_of(SOURCE.parent, "cpu"), row_of(folder, "cpu")
    assert {**after, "cpu": before["cpu"]} == {**before, "spacing": [3.0, 3.0, 3.0], "hu_window": [-100.0, 200.0]}
    assert changed(folder, "inference") == changed(folder, "evaluate") == {"preset": "cpu"}
    assert changed(folder, "train") == {"preset": "cpu", "depths": [1, 1, 1, 1]}


def test_a_row_as_it_was_trained_stays_with_its_comments(tmp_path):
    text = (staged(tmp_path) / "configs" / "tasks.yaml").read_text()
    assert text.endswith((SOURCE / "tasks.yaml").read_text().partition("BTCV:")[2])


@pytest.mark.parametrize("preset", [None, "of another version"])
def test_weights_that_do_not_name_a_preset_state_every_difference_from_the_first(tmp_path, preset):
    row = row_of(staged(tmp_path, preset=preset), "official")
    assert (row["spacing"], row["roi_size"]) == ([4.0, 4.0, 5.0], [64, 64, 32])


def test_comments_stay(tmp_path):
    text = (staged(tmp_path) / "configs" / "inference.yaml").read_text()
    assert "preset: cpu  # null: the model's" in text
    assert text.count("#") == (SOURCE / "inference.yaml").read_text().count("#")
