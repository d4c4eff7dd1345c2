# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""End a run of many tasks without a traceback when it is stopped: what is finished is kept."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def stops_cleanly() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into ``SystemExit`` with 128 + the number of the signal, and a line in the log."""

    def stop(number: int, frame: object) -> None:
        logger.info("stopped by %s; run the same command again to continue", signal.Signals(number).name)
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
