# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A position network is taken as it is, or trained first; what is missing or wrong is named."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from bundles.segmentation.propagation.position import training
from bundles.segmentation.propagation.position.training import position_network_file

ROOT = Path(__file__).parents[4]


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

    def run(command):
        commands.append(command)
        if writes:
            (tmp_path / "out" / "position_network" / "models").mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / "position_network" / "models" / "network.pt").write_bytes(b"")
        return status

    monkeypatch.setattr(training, "_run", run)
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
        (
            {"pretrain_scans": "/data", "pretrain_options": "--preset cpu"},
            "--pretrain_options '--preset cpu' must be a list",
        ),
        ({"pretrain_scans": "/data"}, "needs the bundle swin_unetr_pretrain.*--pretrain_bundle"),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        call(tmp_path, **changes)


def test_other_scans_or_options_do_not_reuse_a_network(tmp_path, bundle, monkeypatch):
    runs(monkeypatch, tmp_path, status=0, writes=True)
    call(tmp_path, pretrain_scans="/data")
    with pytest.raises(InputError, match=r"was made with .*/data.*and this run has .*/other"):
        call(tmp_path, pretrain_scans="/other")


def test_options_with_which_no_step_was_made_may_be_corrected(tmp_path, bundle, monkeypatch):
    runs(monkeypatch, tmp_path, status=1, writes=False)
    with pytest.raises(InputError, match="ended with status 1"):
        call(tmp_path, pretrain_scans="/data", pretrain_options=["--prset", "cpu"])
    runs(monkeypatch, tmp_path, status=0, writes=True)
    assert call(tmp_path, pretrain_scans="/data").endswith("network.pt")


def test_a_stopped_run_stops_the_training_in_order(tmp_path):
    """The child gets SIGTERM and may finish its work."""
    child = tmp_path / "child.py"
    child.write_text(
        "import signal, sys, time, pathlib\n"
        f"def stop(*_): pathlib.Path({str(tmp_path / 'saved')!r}).write_text(''); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).write_text('')\n"
        "time.sleep(60)\n"
    )
    code = f"from bundles.segmentation.propagation.position.training import _run; import sys; _run([sys.executable, {str(child)!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM and (tmp_path / "saved").exists()
