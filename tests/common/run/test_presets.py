# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A preset is the first one of the file with what differs from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bundles.common.errors import InputError
from bundles.common.run.presets import choose

PRESETS = "full: {steps: 100, roi: [96, 96, 96], fill: noise}\nsmall: {steps: 5}\nwrong: {step: 5}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "presets.yaml"
    path.write_text(PRESETS)
    return str(path)


def test_the_first_preset_is_complete_and_the_others_inherit_from_it(file):
    assert choose(preset="full", file=file) == {"steps": 100, "roi": [96, 96, 96], "fill": "noise"}
    assert choose(preset="small", file=file) == {"steps": 5, "roi": [96, 96, 96], "fill": "noise"}


def test_an_unknown_preset_is_refused_with_the_known_ones(file):
    with pytest.raises(InputError, match="'smal' is not one of full, small, wrong") as caught:
        choose(preset="smal", file=file)
    assert file in str(caught.value)


def test_a_value_that_the_first_preset_does_not_know_is_refused(file):
    with pytest.raises(InputError, match="preset 'wrong' sets step, which the first preset 'full' lacks"):
        choose(preset="wrong", file=file)


def test_a_missing_file_points_to_bundle_root(tmp_path):
    with pytest.raises(InputError, match="none.yaml not found.*--bundle_root"):
        choose(preset="full", file=str(tmp_path / "none.yaml"))


def test_all_presets_of_all_bundles_can_be_chosen():
    files = sorted((Path(__file__).parents[3] / "bundles").glob("*/configs/presets.yaml"))
    assert any("swin_unetr_pretrain" in str(path) for path in files)
    for path in files:
        presets = yaml.safe_load(path.read_text())
        first = set(next(iter(presets.values())))
        for name in presets:
            assert set(choose(preset=name, file=str(path))) == first
