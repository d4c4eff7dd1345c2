# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Steps and iterations: a step moves the weights; with gradient accumulation it takes several iterations of the engine.

Everything that a user counts (``max_steps``, the log, checkpoints, the schedule) is in steps.
"""

from __future__ import annotations

from ignite.engine import Engine


def steps_done(engine: Engine) -> int:
    """Whole steps so far, skipped ones included."""
    return engine.state.iteration // engine.accumulation_steps


def ends_step(engine: Engine) -> bool:
    """Whether the iteration in progress, or just completed, is the last of a step."""
    return engine.state.iteration % engine.accumulation_steps == 0
