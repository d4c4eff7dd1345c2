# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""JSON copies of the configs have the content of the YAML files."""

from __future__ import annotations

import json

import pytest
from monai.bundle import ConfigParser

from zoo.package.bundle_files import BUNDLES, copy_bundle
from zoo.package.json_copies import COPIED, differing_copies, write_json_copies


@pytest.fixture(params=["swin_unetr_btcv_seg", "swin_unetr_msd", "swin_unetr_pretrain"])
def configs(request, tmp_path):
    copy_bundle(BUNDLES / request.param, tmp_path / request.param)
    write_json_copies(tmp_path / request.param / "configs")
    return tmp_path / request.param / "configs"


@pytest.mark.parametrize("name", COPIED)
def test_both_load_as_equal_configs(configs, name):
    yaml_config, json_config = (
        ConfigParser.load_config_file(str(configs / f"{name}.{kind}")) for kind in ("yaml", "json")
    )
    assert yaml_config == json_config
    assert list(yaml_config) == list(json_config)
    assert differing_copies(configs) == []


@pytest.mark.parametrize("name", COPIED)
def test_expressions_references_and_kinds_of_values_survive(configs, name):
    def leaves(node, key=""):
        if isinstance(node, dict):
            return [leaf for name, value in node.items() for leaf in leaves(value, f"{key}/{name}")]
        if isinstance(node, list):
            return [leaf for number, value in enumerate(node) for leaf in leaves(value, f"{key}/{number}")]
        return [(key, type(node), node)]

    old, new = (leaves(ConfigParser.load_config_file(str(configs / f"{name}.{kind}"))) for kind in ("yaml", "json"))
    assert old == new
    assert sum(isinstance(value, str) and value.startswith("$") for _, _, value in new) > 10
    assert sum(isinstance(value, str) and value.startswith("@") for _, _, value in new) > 20


def test_a_copy_that_was_edited_alone_is_found(configs):
    content = json.loads((configs / "train.json").read_text())
    (configs / "train.json").write_text(json.dumps({**content, "seed": 1}))
    assert differing_copies(configs) == ["train.json"]
