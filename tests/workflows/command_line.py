# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run a bundle as a user does, in a separate process: ``python -m monai.bundle run`` or ``torchrun``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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


def _command(
    bundle: str,
    configs: str | list[str],
    *,
    cwd: Path | None = None,
    processes: int = 1,
    launch: Sequence[str] = (),
    **options: object,
) -> dict[str, object]:
    folder = BUNDLES / bundle
    prefix = "configs" if cwd is None else str(folder / "configs")
    names = [configs] if isinstance(configs, str) else configs
    files = [f"{prefix}/{name}" for name in names]
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launch = ["--standalone", f"--nproc_per_node={processes}"]
    if launch:
        command += ["-m", "torch.distributed.run", *launch]
    command += ["-m", "monai.bundle", "run", "--config_file", files[0] if len(files) == 1 else repr(files)]
    if cwd is not None:
        command += ["--bundle_root", str(folder)]
    for name, value in options.items():
        command += [f"--{name}", "$None" if value is None else str(value)]
    return {"args": command, "cwd": cwd or folder, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def run_bundle(bundle: str, configs: str | list[str], **options: object) -> subprocess.CompletedProcess:
    """Run one workflow from inside the bundle's folder, or from ``cwd`` with ``--bundle_root``.

    Args:
        bundle: folder name.
        configs: file names in its ``configs/``.
        options: options of the config, as on the command line; also ``cwd`` (working folder), ``processes`` (more than
            one are started by ``torchrun``) and ``launch`` (other options of ``torchrun``).
    """
    return subprocess.run(
        **_command(bundle, configs, **options), capture_output=True, text=True, timeout=900, check=False
    )


def kill_when(bundle: str, configs: str | list[str], *, appears: Path, **options: object) -> None:
    """Start a workflow as `run_bundle` does, and kill it as soon as a file appears."""
    process = subprocess.Popen(
        **_command(bundle, configs, **options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(6000):
            if appears.exists() or process.poll() is not None:
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert appears.exists(), f"the run ended with status {process.returncode} before it wrote {appears}"


def start(bundle: str, configs: str | list[str], **options: object) -> subprocess.Popen:
    """Start a workflow as `run_bundle` does, in its own process group, and return the running process."""
    command = _command(bundle, configs, **options)
    return subprocess.Popen(
        **command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def signal_when(
    bundle: str, configs: str | list[str], number: signal.Signals, *, says: str, **options: object
) -> tuple[int, str]:
    """Start a workflow as `run_bundle` does, signal its process group when its output contains a text, and wait.

    Returns:
        Exit status and output.
    """
    process = start(bundle, configs, **options)
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
