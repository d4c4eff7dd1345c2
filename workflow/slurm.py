# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Cancel jobs that an engine left in SLURM's queue when it was killed, before the same workflow starts again.

Snakemake would submit them a second time, in addition to the first.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from bundles.common.errors import InputError

RUN_ID = re.compile(r"SLURM run ID: (\S+)")
PATIENCE = 60.0  # seconds that SLURM's commands may take to answer


def run_ids(out: Path) -> list[str]:
    """Return the names that the engines of a folder gave their jobs, from the engines' own logs.

    Args:
        out: output folder of a workflow.
    """
    logs = sorted((out / ".snakemake" / "log").glob("*.log"))
    found = [name for log in logs for name in RUN_ID.findall(log.read_text(encoding="utf-8", errors="replace"))]
    return list(dict.fromkeys(found))


def cancel_left_jobs(out: Path, *, say: Callable[[str], None] = print) -> list[str]:
    """Cancel what is still queued or running for a folder that no engine works in.

    Args:
        out: output folder of a workflow, claimed by this process.
        say: gets a line if there is something to cancel.

    Returns:
        The numbers of the jobs.

    Raises:
        InputError: SLURM does not answer.
    """
    names = run_ids(out)
    if not names:
        return []
    jobs = _slurm("squeue", "--noheader", f"--name={','.join(names)}", "--format=%A").split()
    if jobs:
        say(f"Cancelling {len(jobs)} jobs that an earlier start left in SLURM's queue; they go on where they were.")
        _slurm("scancel", *jobs)
    return jobs


def _slurm(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"SLURM does not answer ({words[0]}: {error}). Check that the cluster is up.") from None
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()), f"status {done.returncode}")
        raise InputError(f"SLURM does not answer ({words[0]}: {reason}). Check that the cluster is up.")
    return done.stdout
