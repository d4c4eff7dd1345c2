# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a package in a separate process that cannot import this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..forked_python import run


def python(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with ``environment`` in addition to the current one; it must succeed.

    With variables of its own, it is started anew: libraries may read them when they are imported.
    """
    whole = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore", **environment}
    if environment:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=cwd, env=whole, capture_output=True, text=True, timeout=600)
    else:
        done = run(words, cwd=cwd, env=whole, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done
