# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The help lists the options that a config has, with the values that a run would take, and ends with status 0."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from bundles.common.errors import InputError
from bundles.common.run.option_help import Option, default_of, help_text, options_of, values_of
from bundles.common.run.options import END, option_names

from ...forked_python import ROOT, run

CONFIGS = sorted({path for path in ROOT.glob("bundles/swin_unetr_*/configs/*.yaml") if f"\n{END}:" in path.read_text()})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.name}")
def test_every_option_of_every_config_is_listed_once_with_its_comment(file):
    expected = [name for name in option_names(ConfigParser.load_config_file(str(file))) if name != "imports"]
    found = options_of(file)
    assert [option.name for option in found] == [name for name in expected if name != "bundle_root"]
    assert [option.name for option in found if not option.comment] == []


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "presets.yaml").write_text("large: {steps: 500, size: [2, 2]}\nsmall: {steps: 5}\n")
    (tmp_path / "train.yaml").write_text(
        "# How to run it\nimports:\n- $import torch\n\nfirst: 1\n# ------------ what to run\npreset: large  # large or small\n"
        "steps: $@values['steps']  # more is better\nsize: $@values['size']  # voxels\nbundle_root: .\n"
        "# ------------ output\noutput_dir: $@bundle_root + '/output'  # a folder: a/b\nlabels: $@row['labels']\n"
        "device: {_target_: x.y, z: '@steps'}  # the GPU\nnothing: null\npath: '%a::b'\ntext: 'a # b'  # c\nlist: [1, 2]\n"
        f"{END}: x\nhidden: 3\n"
    )
    return tmp_path / "train.yaml"


def test_options_are_read_with_group_default_and_comment(config):
    options = options_of(config)
    assert options[0] == Option("", "first", "1", "")
    assert options[1] == Option("What to run", "preset", "large", "large or small")
    assert Option("Output", "list", "[1, 2]", "") in options
    assert not {"imports", "bundle_root", "hidden", END} & {option.name for option in options}


def test_defaults_are_the_values_of_the_preset(config):
    def defaults(preset: str | None) -> dict[str, str]:
        _, values = values_of(config, preset)
        return {option.name: default_of(option, values) for option in options_of(config)}

    assert defaults(None)["steps"] == "500"
    assert defaults("small") == {
        **{"first": "1", "preset": "large", "steps": "5", "size": "[2, 2]", "output_dir": "BUNDLE/output"},
        **{"labels": "from the task", "device": "automatic", "nothing": "null", "path": "null", "text": "a # b"},
        "list": "[1, 2]",
    }
    with pytest.raises(InputError, match="'tiny' is not one of large, small"):
        defaults("tiny")
    assert default_of(Option("", "steps", "$@values['steps']", ""), None) == "from the preset"


def test_the_page_has_groups_defaults_and_comments(config):
    page = help_text([str(config)], preset="small")
    assert "each as --name value. Defaults are those of --preset small." in " ".join(page.split())
    assert "\nWhat to run\n  --preset large\n      large or small\n  --steps 5\n      more is better\n" in page
    assert page.rstrip().endswith(")") and "Presets: large, small" in page


def test_a_config_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="trian.yaml not found"):
        options_of(tmp_path / "trian.yaml")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--preset", "cpu", "--help"]])
def test_help_on_the_command_line_prints_them_and_ends_well(words):
    folder = ROOT / "bundles" / "swin_unetr_pretrain"
    command = ["-m", "monai.bundle", "run", "--config_file", "configs/train.yaml", *words]
    done = run(command, cwd=folder, env=dict(os.environ), timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    steps = {"cpu": "200", None: "100000"}["cpu" if "cpu" in words else None]
    assert f"  --max_steps {steps}\n" in done.stdout and "Stopped" not in done.stderr
