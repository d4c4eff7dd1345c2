# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Show how far a list of tasks is: a bar in a terminal, else a line in the log every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal

Result = TypeVar("Result")


def with_progress(results: Iterable[Result], count: int, *, doing: str, unit: str = "scans") -> Iterator[Result]:
    """Yield the results as they come, and show how many are done and how long the rest will take.

    Args:
        results: one per task.
        count: number of tasks.
        doing: what is done to them, such as "preparing".
        unit: what they are, in the plural.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from with_lines(results, count, doing=doing, unit=unit)
        return
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar, start = progress.add_task("", total=count, rate=""), time.monotonic()
        for number, result in enumerate(results, 1):
            progress.update(bar, advance=1, rate=_rate(number / (time.monotonic() - start)))
            yield result


def with_lines(
    results: Iterable[Result], count: int, *, doing: str, unit: str, says_end: bool = True
) -> Iterator[Result]:
    """Yield the results as they come, with a line in the log every few seconds, also in a terminal.

    Args:
        results, count, doing, unit: see `with_progress`.
        says_end: write a last line; False: what took no longer than the time between two lines writes none at all.
    """
    start = last = time.monotonic()
    for number, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and number < count or number == count and says_end:
            last, rate = now, number / (now - start)
            left = duration((count - number) / rate)
            logger.info("%s: %d of %d %s, %s, %s left", doing, number, count, unit, _rate(rate), left)


def duration(seconds: float) -> str:
    """Return a duration as a person says it: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _rate(per_second: float) -> str:
    return f"{per_second:.1f} a second" if per_second >= 0.1 else f"{60 * per_second:.1f} a minute"
