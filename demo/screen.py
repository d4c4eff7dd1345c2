# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Show how far a demo is: one bar over all its stages, or plain lines without a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .stage import Stage
from .summary import clock

# Example: step 120/300  loss 1.23 inpainting 0.40 ...  lr 1.00e-03  3.20 crops/s  left 2:31
STEP_LINE = re.compile(r"step (\d+)/(\d+)  loss (\S+).*left (\d+(?::\d\d)+)")


class Screen:
    """One progress bar over all stages. Without a terminal, a plain line every few seconds.

    Args:
        todo: stages to run.
        console: where to draw.
        every: seconds between plain lines.
    """

    def __init__(self, todo: Sequence[Stage], console: Console, every: float = 5.0) -> None:
        self.expected = {stage.name: stage.seconds for stage in todo}
        self.taken: dict[str, float] = {}
        self.console = console
        self.every = every
        self.began = self.last_line = time.monotonic()
        self.share = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[times]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=1.0, times="")

    def begin(self, stage: Stage, resumed: bool) -> None:
        """Show that a stage begins, or resumes after an interruption."""
        self.stage, self.stage_began, self.step = stage, time.monotonic(), None
        if not self.console.is_terminal:
            self.console.print(f"{stage.title} ..." + " (continuing the interrupted run)" * resumed)
        self.update("")

    def update(self, text: str) -> None:
        """Draw the progress.

        Args:
            text: what the stage has printed since the last call.
        """
        now = time.monotonic()
        for match in STEP_LINE.finditer(text):
            self.step = (match[1], match[2], match[3], _seconds(match[4]), now)
        elapsed = now - self.stage_began
        share, left = estimate(self.expected, self.taken, self.stage.name, elapsed, self._stage_left(now))
        self.share = max(self.share, share)
        at = f"step {self.step[0]}/{self.step[1]}, loss {float(self.step[2]):.3f}" if self.step else ""
        times = f"{clock(now - self.began)}, {clock(left)} left"
        self.bar.update(self.task, completed=self.share, description=f"{self.stage.title}  {at}".strip(), times=times)
        if not self.console.is_terminal and now - self.last_line >= self.every:
            self.last_line = now
            self.console.print(f"{self.share:4.0%}  {self.stage.title}  {at}  [{times}]", markup=False, soft_wrap=True)

    def _stage_left(self, now: float) -> float | None:
        """Return the seconds left by the stage's last progress line, plus two for its last validation and its files."""
        return None if self.step is None else max(0.0, self.step[3] - (now - self.step[4])) + 2

    def end(self) -> None:
        """Show that the stage has finished."""
        self.taken[self.stage.name] = time.monotonic() - self.stage_began
        self.console.print(f"{self.stage.title:<30} done in {clock(self.taken[self.stage.name])}", highlight=False)


def _seconds(text: str) -> int:
    total = 0
    for part in text.split(":"):
        total = 60 * total + int(part)
    return total


def estimate(
    expected: dict[str, float], taken: dict[str, float], running: str, elapsed: float, stage_left: float | None
) -> tuple[float, float]:
    """Estimate progress and time left by comparing the stages so far with their expected times.

    Args:
        expected: expected seconds of each stage to run, by name.
        taken: actual seconds of each finished stage.
        running: name of the running stage.
        elapsed: seconds since the running stage began.
        stage_left: seconds that the running stage still needs; None if it has not reported any.

    Returns:
        The share done, 0 to 1, and the seconds left.
    """
    before = sum(expected[name] for name in taken)
    pace = sum(taken.values()) / before if taken else 1.0
    if stage_left is None:
        stage_left = max(0.05 * expected[running], pace * expected[running] - elapsed)
    pace = (sum(taken.values()) + elapsed + stage_left) / (before + expected[running])
    after = sum(expected.values()) - before - expected[running]
    done = before + expected[running] * elapsed / max(elapsed + stage_left, 1e-9)
    return done / sum(expected.values()), stage_left + pace * after
