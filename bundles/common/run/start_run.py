# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The first step of every run, before anything is built or read."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from monai.utils import set_determinism

from ..errors import InputError, report_input_errors
from ..value_rules import SEED, SWITCH
from . import distributed as processes
from .command_line import check_command_line, typed_command
from .known_lines import hide_known_lines

logger = logging.getLogger(__name__)


def start_run(
    *, seed: int, distributed: bool = False, deterministic: bool = False, resolved: dict[str, Any] | None = None
) -> None:
    """Report bad input as one message, refuse misspelt options, join the other processes, seed the random generators.

    The command is the first line of the log, and the lines of `known_lines` are hidden.

    Args:
        seed: seed of all random generators.
        distributed: whether this is one of several processes.
        deterministic: see `choose_algorithms`.
        resolved: the ids that the config parser has resolved so far (``$__local_refs`` in a config expression). The
            options that the command line writes as ``true``, ``false``, ``null`` or ``None`` are added to it.

    Raises:
        InputError: see `check_command_line` and `distributed.start`.
    """
    report_input_errors()
    hide_known_lines()
    for name, value in check_command_line().items():
        if resolved is None or name in resolved:  # already used: too late to change
            raise InputError(f"--{name} must be written as in Python: True, False, or '$None' in single quotes.")
        resolved[name] = value
    SEED.check("seed", seed)
    processes.start(distributed)
    if processes.rank() == 0 and (command := typed_command()):
        logger.info("%s", command)
    set_determinism(seed=seed)
    choose_algorithms(deterministic=deterministic)


def choose_algorithms(*, deterministic: bool) -> None:
    """Choose between speed and equal bits on a GPU. On a CPU it changes nothing.

    Args:
        deterministic: False: the fastest algorithms, some of which add up in any order. True: only algorithms that give
            equal bits in each run, where there are any; PyTorch warns of each operation that has none.

    Raises:
        InputError: ``deterministic`` is neither True nor False.
    """
    SWITCH.check("deterministic", deterministic)
    if deterministic:  # read by cuBLAS when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False  # trials of each new shape were not measured
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
