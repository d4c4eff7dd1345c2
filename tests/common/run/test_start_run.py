# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What a run does first: seeds, refusals, and the message of an InputError."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.run.start_run import start_run

from ...forked_python import run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tidy(monkeypatch):
    """Leave the hook of uncaught errors and torch's determinism flags as they were."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


def test_the_seed_fixes_all_generators(tidy):
    def draws(seed):
        start_run(seed=seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draws(3) == draws(3)
    assert all(one != other for one, other in zip(draws(3), draws(4), strict=True))


def test_torchrun_without_the_overlay_is_refused(tidy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun started 2 processes.*multi_gpu_train.yaml"):
        start_run(seed=0)


def test_the_overlay_without_torchrun_is_refused(tidy, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun --standalone"):
        start_run(seed=0, distributed=True)


def test_a_misspelt_option_of_a_real_command_line_ends_with_one_message(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("max_steps: 5\nrun: [{_target_: bundles.common.run.start_run.start_run, seed: 0}]\n")
    words = ["-m", "monai.bundle", "run", "--config_file", config, "--max_step", "3"]
    ended = run(words, cwd=ROOT, env=os.environ, timeout=300)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("Stopped: --max_step is not an option of") and "--max_steps" in last


def test_words_of_yaml_on_a_real_command_line_mean_what_they_mean_there(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(
        "flag: true\nother: false\nnumber: 5\nsum: $str(@flag) + str(@other) + str(@number)\n"
        "run:\n- {_target_: bundles.common.run.start_run.start_run, seed: 0, resolved: $__local_refs}\n- $print('meant', @sum)\n"
    )
    words = [
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        config,
        "--flag",
        "false",
        "--other=true",
        "--number",
        "null",
    ]
    ended = run(words, cwd=ROOT, env=os.environ, timeout=300)
    assert "meant FalseTrueNone" in ended.stdout, ended.stderr[-2000:]


def test_a_word_for_what_has_been_resolved_before_is_refused(monkeypatch, tidy, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("distributed: false\nrun: []\n")
    main = "/x/monai/bundle/__main__.py"
    monkeypatch.setattr(sys, "argv", [main, "run", "--config_file", str(config), "--distributed", "true"])
    with pytest.raises(InputError, match="--distributed must be written as in Python"):
        start_run(seed=0, resolved={"distributed": "true"})


def test_speed_or_equal_bits_is_an_option(tidy):
    for deterministic in (True, False):
        start_run(seed=0, deterministic=deterministic)
        assert torch.backends.cudnn.deterministic is deterministic and not torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    start_run(seed=0)
    assert torch.backends.cudnn.deterministic is False
    with pytest.raises(InputError, match="--deterministic 'maybe' must be true or false"):
        start_run(seed=0, deterministic="maybe")
