# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a package in a separate process that cannot import this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with ``environment`` in addition to the current one; it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore", **environment}
    command = [sys.executable, *map(str, words)]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    return run
