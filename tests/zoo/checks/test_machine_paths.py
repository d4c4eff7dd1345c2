# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Machine-specific paths are found in the values of configs, without false positives."""

from __future__ import annotations

import json

import pytest

from bundles.common.errors import InputError
from zoo.checks.machine_paths import check_machine_paths, machine_paths
from zoo.package.bundle_files import BUNDLES


@pytest.mark.parametrize(
    "value",
    [
        "/home/ann/data",
        "~/data",
        "~",
        "C:\\scans",
        "D:/scans",
        "\\\\server\\scans",
        "file:///mnt/scans",
        "sqlite:////mnt/mlruns.db",
        "%/mnt/other.json::network",
        "$'/mnt/scans' + '/imagesTr'",
        "$os.path.join('/mnt', @name)",
        "['/mnt/a', '/mnt/b']",
        '$Path("~/data")',
        "$HOME/data",
        "${HOME}/data",
        "$HOME",
        "$os.path.expandvars('$HOME/data')",
        " /home/ann",
        "$' /home/ann'",
    ],
)
def test_a_place_on_one_machine_is_found(tmp_path, value):
    (tmp_path / "train.json").write_text(json.dumps({"train": {"dirs": ["output", value]}}))
    assert machine_paths(tmp_path) == [f"train.json, train::dirs::1: {value}"]


@pytest.mark.parametrize(
    "value",
    [
        "$@bundle_root + '/data'",
        "$@output_dir + '/models' if @resume else None",
        "./data",
        "https://example.org/data",
        "sqlite:///output/mlruns.db",
        "HU / 1000",
        "@train::scans",
        "$@hu_window[0] / 2",
        "scripts.common.run.start_run.start_run",
        "~5 cases",
        "$HOMES",
        "a /b",
    ],
)
def test_what_only_looks_like_a_place_is_left_alone(tmp_path, value):
    (tmp_path / "train.json").write_text(json.dumps({"a": value}))
    assert machine_paths(tmp_path) == []


def test_yaml_and_logging_are_read_and_comments_are_not(tmp_path):
    (tmp_path / "train.yaml").write_text("# --dataset_dir /data/btcv\ndataset_dir: /data/btcv  # or /data/other\n")
    (tmp_path / "logging.conf").write_text("[handler_file]\nclass=FileHandler\nargs=('/var/log/train.log', 'a')\n")
    (tmp_path / "notes.txt").write_text("/home/ann")
    (tmp_path / "more/deep").mkdir(parents=True)
    (tmp_path / "more/deep/train.yaml").write_text("dataset_dir: /data/ct\n")
    assert machine_paths(tmp_path) == [
        "logging.conf, handler_file, args: ('/var/log/train.log', 'a')",
        "more/deep/train.yaml, dataset_dir: /data/ct",
        "train.yaml, dataset_dir: /data/btcv",
    ]
    with pytest.raises(InputError, match=r"train\.yaml, dataset_dir: /data/btcv.*relative to the bundle"):
        check_machine_paths(tmp_path)


@pytest.mark.parametrize("name", ["swin_unetr_btcv_seg", "swin_unetr_msd", "swin_unetr_pretrain"])
def test_the_bundles_name_no_place(name):
    assert machine_paths(BUNDLES / name / "configs") == []
