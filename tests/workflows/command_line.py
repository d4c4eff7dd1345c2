# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a bundle as a user does, in a separate process: ``python -m monai.bundle run`` or ``torchrun``.

One process of ``python -m monai.bundle`` is forked from one that has imported MONAI (`tests.forked_python`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..forked_python import ForkedPython

ROOT = Path(__file__).parents[2]
BUNDLES = ROOT / "bundles"

# The smallest network and crop that can train: 64x32x32 leaves two voxels at the bottleneck.
SMALL = {
    "preset": "cpu",
    "roi_size": "[32,32,64]",
    "depths": "[1,1,1,1]",
    "max_steps": 2,
    "val_interval": 2,
    "log_every": 1,
}


def command(
    bundle: str,
    configs: str | list[str],
    *,
    cwd: Path | None = None,
    processes: int = 1,
    launch: Sequence[str] = (),
    **options: object,
) -> dict[str, object]:
    """Return the arguments of `subprocess.Popen` that start a workflow; `run_bundle` explains the arguments."""
    folder = BUNDLES / bundle
    prefix = "configs" if cwd is None else str(folder / "configs")
    names = [configs] if isinstance(configs, str) else configs
    files = [f"{prefix}/{name}" for name in names]
    if processes > 1:
        launch = ["--standalone", f"--nproc_per_node={processes}"]
    words = ["-m", "torch.distributed.run", *launch] if launch else []
    words += ["-m", "monai.bundle", "run", "--config_file", files[0] if len(files) == 1 else repr(files)]
    if cwd is not None:
        words += ["--bundle_root", str(folder)]
    for name, value in options.items():
        words += [f"--{name}", "$None" if value is None else str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, "-W", "ignore", *words], "cwd": cwd or folder, "env": environment}


def start(
    bundle: str, configs: str | list[str], *, merge: bool = True, **options: object
) -> subprocess.Popen | ForkedPython:
    """Start a workflow as `run_bundle` does, in its own process group, and return the running process.

    Args:
        bundle: folder name.
        configs: file names in its ``configs/``.
        merge: whether what it writes to stderr goes into its output.
        options: see `run_bundle`.
    """
    how = command(bundle, configs, **options)
    words = how.pop("args")
    if "torch.distributed.run" in words:
        stderr = subprocess.STDOUT if merge else subprocess.PIPE
        return subprocess.Popen(words, **how, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True)
    return ForkedPython(words[3:], **how, merge=merge, start_new_session=True)


def run_bundle(bundle: str, configs: str | list[str], **options: object) -> subprocess.CompletedProcess:
    """Run one workflow from inside the bundle's folder, or from ``cwd`` with ``--bundle_root``.

    Args:
        bundle: folder name.
        configs: file names in its ``configs/``.
        options: options of the config, as on the command line; also ``cwd`` (working folder), ``processes`` (more than
            one are started by ``torchrun``) and ``launch`` (other options of ``torchrun``).
    """
    process = start(bundle, configs, merge=False, **options)
    try:
        stdout, stderr = process.communicate(timeout=900)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def kill_when(bundle: str, configs: str | list[str], *, appears: Path, **options: object) -> None:
    """Start a workflow as `run_bundle` does, and kill it as soon as a file appears."""
    process = start(bundle, configs, **options)
    try:
        for _ in range(6000):
            if appears.exists() or process.poll() is not None:
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert appears.exists(), f"the run ended with status {process.returncode} before it wrote {appears}"


def signal_when(
    bundle: str, configs: str | list[str], number: signal.Signals, *, says: str, **options: object
) -> tuple[int, str]:
    """Start a workflow as `run_bundle` does, signal its process group when its output contains a text, and wait.

    Returns:
        Exit status and output.
    """
    process = start(bundle, configs, **options)
    if isinstance(process, ForkedPython):
        while says not in process.output and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        return process.wait(timeout=600), process.output
    lines, sent = [], False
    for line in process.stdout:
        lines.append(line)
        if says in line and not sent:
            os.killpg(process.pid, number)
            sent = True
    return process.wait(timeout=600), "".join(lines)


def succeed(run: subprocess.CompletedProcess) -> str:
    """Assert that a run succeeded; return its output."""
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    return run.stdout
