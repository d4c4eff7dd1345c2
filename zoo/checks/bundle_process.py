# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run `workflow_checks` on a bundle in a separate process, with only the bundle on the Python path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .workflow_checks import CHECKS, MARK

#: Variables that the process gets. It runs a bundle's code: no tokens, no passwords, no proxies.
PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
PROGRAM = Path(__file__).with_name("workflow_checks.py")


def run_checks(bundle: Path, names: Sequence[str] = tuple(CHECKS)) -> Iterator[tuple[str, str | None]]:
    """Run checks; yield the name of each and what is wrong (None: nothing) as soon as it ends.

    Args:
        bundle: folder of the bundle, without links.
        names: checks to run, keys of `workflow_checks.CHECKS`.
    """
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"PYTHONPATH": str(bundle), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", str(PROGRAM), str(bundle), *names]
    todo, tail = list(names), []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            if line.startswith(MARK):
                result = json.loads(line.removeprefix(MARK))
                todo.remove(result["check"])
                yield result["check"], result["failure"]
            elif line.strip():
                tail = [*tail[-4:], line.strip()]
    for name in todo:
        yield name, f"the process ended with status {process.returncode}: {' / '.join(tail)}"
