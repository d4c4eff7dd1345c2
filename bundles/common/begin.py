# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What every run does first, before it builds or reads anything."""

from __future__ import annotations

from monai.utils import set_determinism

from . import distributed as processes
from .input_error import InputError, report_input_errors
from .override_keys import refuse_unknown_options


def begin(*, seed: int, distributed: bool = False) -> None:
    """Report bad input as one message, refuse misspelt options, join the other processes, seed the random generators.

    Raises:
        InputError: see `refuse_unknown_options` and `distributed.start`.
    """
    report_input_errors()
    refuse_unknown_options()
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed!r} must be a whole number from 0 to 2^32 - 1.")
    processes.start(distributed)
    set_determinism(seed=seed)
