# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""End a process with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends, however that ends; elsewhere, do nothing.

    A ``torchrun`` that is killed (kill -9, full memory) leaves its processes running. They would wait for each other
    for half an hour, keep the GPUs, and keep the output folder claimed.
    """
    if sys.platform == "linux":
        parent, set_death_signal = os.getppid(), 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
