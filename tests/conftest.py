# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What several test files share."""

from __future__ import annotations

import copy
import logging
import os
import signal

import pytest

# Two workers on two cores: one thread each, in their children too. Threads of torch wait for each other by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On the CPU, also where there is a GPU: figures are compared to the bit, and tests start more processes than a machine
# has GPUs. What needs one is in benchmarks/gpu_check.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Long files first (setup.cfg keeps this order): at the end no worker waits for a long file of the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, "workflows" not in item.path.parts))


#: Encoder record: 32^3 crops have a 1x1x1 bottleneck, 64x64x32 ones 2x2x1.
TINY_ENCODER = {
    "in_channels": 1,
    "feature_size": 12,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
    "patch_size": 2,
    "merging": "monai",
    "use_v2": False,
}


@pytest.fixture(autouse=True)
def own_signals():
    """Ctrl-C and SIGTERM as a terminal has them, whoever started the tests, and whatever the test before has left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield


@pytest.fixture(autouse=True)
def own_logging():
    """Logging as it was: what a run configures must not change what the next test reads of its own messages."""
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, one.level, one.handlers[:], one.disabled) for one in (logging.root, *loggers)]
    yield
    for one, level, handlers, disabled in before:
        if one.level != level:  # setting it clears the cache of every logger, of which MONAI and torch bring hundreds
            one.setLevel(level)
        one.handlers[:] = handlers
        one.disabled = disabled


@pytest.fixture
def record():
    """`TINY_ENCODER`, which a test may change."""
    return copy.deepcopy(TINY_ENCODER)
