# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Defaults are changed in the text of a config; everything else in it stays unchanged."""

from __future__ import annotations

import pytest
import yaml

from bundles.common.errors import InputError
from zoo.package.trained_settings import set_defaults

TEXT = """# Head
task: null  # a row of tasks.yaml; see # 4
preset: official  # official or cpu
size: $@values['size']
labels: {"0": background}
nested:
  task: null  # another
name: 'a # b'  # with a hash
"""


def test_values_change_and_comments_stay(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    set_defaults(path, {"task": "Task09_Spleen", "preset": "cpu", "size": [64, 64.5], "name": None})
    assert path.read_text() == TEXT.replace("task: null  # a row", "task: Task09_Spleen  # a row").replace(
        "preset: official", "preset: cpu"
    ).replace("$@values['size']", "[64, 64.5]").replace("name: 'a # b'", "name: null")


@pytest.mark.parametrize("value", ["yes", "null", "1", "a: b", "$@x", "007", "", "True"])
def test_a_text_stays_a_text(tmp_path, value):
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    set_defaults(path, {"task": value})
    assert yaml.safe_load(path.read_text())["task"] == value


@pytest.mark.parametrize("key", ["absent", "nested"])
def test_an_entry_that_is_not_on_one_line_is_refused_and_the_file_stays(tmp_path, key):
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    with pytest.raises(InputError, match=f"a.yaml: {key} cannot be set"):
        set_defaults(path, {key: 1})
    assert path.read_text() == TEXT
