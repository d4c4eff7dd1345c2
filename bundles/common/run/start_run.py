# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What every run does first, before it builds or reads anything."""

from __future__ import annotations

from typing import Any

from monai.utils import set_determinism

from ..errors import InputError, report_input_errors
from . import distributed as processes
from .command_line import check_command_line


def start_run(*, seed: int, distributed: bool = False, resolved: dict[str, Any] | None = None) -> None:
    """Report bad input as one message, refuse misspelt options, join the other processes, seed the random generators.

    Args:
        seed: of all generators.
        distributed: whether this is one of several processes.
        resolved: what the config parser has resolved so far, by id (``$__local_refs``, the name that its expressions know it by): gets the options
            that the command line writes as ``true``, ``false``, ``null`` or ``None``.

    Raises:
        InputError: see `check_command_line` and `distributed.start`.
    """
    report_input_errors()
    for name, value in check_command_line().items():
        if resolved is None or name in resolved:  # too late for what has been made of it
            raise InputError(f"--{name} must be written as Python does: True, False, or '$None' in single quotes.")
        resolved[name] = value
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed!r} must be a whole number from 0 to 2^32 - 1.")
    processes.start(distributed)
    set_determinism(seed=seed)
