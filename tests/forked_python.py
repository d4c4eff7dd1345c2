# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run ``python`` in a process that is forked from one which has imported MONAI: seconds less per run.

The process has its own working folder, environment, path, arguments and output, and none of this project is imported
before it starts. A test that looks at the start itself uses `subprocess`.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What the bundles import beside the standard library, so that a fork has it. Nothing of this project.
PRELOADED = [
    "monai.bundle",
    "mlflow",
    "torch.utils.tensorboard",
    "torch._inductor",  # which `torch.use_deterministic_algorithms` imports
    "nibabel",
    "pydicom",
    "highdicom",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "contourpy",
    "scipy.ndimage",
    "rich.progress",
    "jinja2",
    "blosc2",
]

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(PRELOADED)


class ForkedPython:
    """A running ``python -m MODULE`` or ``python -c CODE``, with the part of `subprocess.Popen` that the tests use.

    Args:
        words: ``-m``, the module and its arguments, or ``-c``, the code and its arguments.
        cwd: working folder.
        env: environment, whole.
        merge: whether what it writes to stderr goes into its output.
        start_new_session: whether it leads a process group of its own, so that a test can signal the group.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        cwd: Path,
        env: dict[str, str],
        merge: bool = False,
        start_new_session: bool = False,
    ) -> None:
        self.args = list(map(str, words))
        self._folder = tempfile.TemporaryDirectory()
        self._stdout = Path(self._folder.name, "stdout")
        self._stderr = self._stdout if merge else Path(self._folder.name, "stderr")
        arguments = (self.args, str(cwd), dict(env), str(self._stdout), str(self._stderr), start_new_session)
        self._process = _FORKING.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, minus the signal's number if one ended it, None while it runs."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        """What it has written to stdout so far."""
        return _text(self._stdout)

    @property
    def errors(self) -> str:
        """What it has written to stderr so far."""
        return _text(self._stderr)

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, as `wait` does; return what it has written to stdout and stderr."""
        self.wait(timeout)
        return self.output, self.errors

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()


def run(words: Sequence[object], *, cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE`` or ``python -c CODE`` to its end, as `subprocess.run` with captured text does.

    Raises:
        subprocess.TimeoutExpired: it takes longer than ``timeout`` seconds; it is killed.
    """
    process = ForkedPython(words, cwd=cwd, env=env)
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, status, process.output, process.errors)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _run(words: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str, own_session: bool) -> None:
    """Become ``python -W ignore`` with these words, and end as the interpreter ends."""
    if own_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((1, stdout), (2, stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    listed = env.get("PYTHONPATH", "").split(os.pathsep)
    installed = [entry for entry in sys.path if entry and Path(entry) != ROOT and ROOT / "tests" != Path(entry)]
    sys.path[:] = [cwd, *filter(None, listed), *installed]
    sys.argv = words[1:] if words[0] == "-m" else [words[0], *words[2:]]
    sys.warnoptions = ["ignore"]
    warnings.simplefilter("ignore")
    sys.modules.pop("sitecustomize", None)
    with suppress(ImportError):
        importlib.import_module("sitecustomize")  # as a start would, if the path has one
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    multiprocessing.set_start_method(None, force=True)  # a child of multiprocessing would hand on "forkserver"
    status = _status_of(*words[:2])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _status_of(option: str, module: str) -> int:
    try:
        if option == "-m":
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            exec(compile(module, "<string>", "exec"), sys.modules["__main__"].__dict__)
        threading._shutdown()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        print(ended.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
