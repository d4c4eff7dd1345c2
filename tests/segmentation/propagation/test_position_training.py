# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A position network is taken as it is, or trained first; what is missing or wrong is named."""

from __future__ import annotations

import subprocess

import pytest

from bundles.common.errors import InputError
from bundles.segmentation.propagation import position_training
from bundles.segmentation.propagation.position_training import position_network_file


def call(tmp_path, **changes):
    options = {"position_network": None, "pretrain_scans": None, "pretrain_bundle": str(tmp_path / "bundle")}
    options |= {"pretrain_options": ["--preset", "cpu"], "output_dir": str(tmp_path / "out"), "device": "cpu"}
    return position_network_file(**{**options, **changes})


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    (tmp_path / "bundle" / "configs" / "train.yaml").write_text("")


def runs(monkeypatch, tmp_path, *, status: int, writes: bool):
    """Stand in for the training; return the commands."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if writes:
            (tmp_path / "out" / "position_network" / "models").mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / "position_network" / "models" / "network.pt").write_bytes(b"")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(position_training.subprocess, "run", run)
    return commands


def test_a_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "network.pt").write_bytes(b"")
    assert call(tmp_path, position_network=str(tmp_path / "network.pt")) == str(tmp_path / "network.pt")


def test_scans_are_trained_on_once(tmp_path, bundle, monkeypatch):
    commands = runs(monkeypatch, tmp_path, status=0, writes=True)
    for _ in range(2):
        result = call(tmp_path, pretrain_scans=["/data/a", "/data/b"])
        assert result == str(tmp_path / "out" / "position_network" / "models" / "network.pt")
    (command,) = commands
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--dataset_dir"] == "['/data/a', '/data/b']" and options["--tasks"] == "['position']"
    assert options["--preset"] == "cpu" and options["--resume"] == "False"


def test_a_stopped_training_goes_on(tmp_path, bundle, monkeypatch):
    commands = runs(monkeypatch, tmp_path, status=143, writes=False)
    (tmp_path / "out" / "position_network" / "models").mkdir(parents=True)
    (tmp_path / "out" / "position_network" / "models" / "last.pt").write_bytes(b"")
    with pytest.raises(InputError, match="ended with status 143"):
        call(tmp_path, pretrain_scans="/data")
    assert commands[0][commands[0].index("--resume") + 1] == "True"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Give either --position_network"),
        ({"position_network": "a.pt", "pretrain_scans": "/data"}, "Give either --position_network"),
        ({"position_network": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"pretrain_scans": "/data"}, "needs the bundle swin_unetr_pretrain.*--pretrain_bundle"),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        call(tmp_path, **changes)
