# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The log says how far a list of tasks is, with the time left by the rate so far."""

from __future__ import annotations

import logging

import pytest

from bundles.common.run import progress
from bundles.common.run.progress import duration, with_lines, with_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the tasks move."""

    class Clock:
        now = 0.0

        def tasks(self, *seconds):
            for number, length in enumerate(seconds):
                self.now += length
                yield number

    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def lines(caplog, results) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        list(results)
    return [record.getMessage() for record in caplog.records]


def test_a_line_every_few_seconds_and_one_at_the_end(clock, caplog):
    told = lines(caplog, with_progress(clock.tasks(4, 4, 4, 4), 4, doing="preparing"))
    assert told == [
        "preparing: 3 of 4 scans, 0.2 a second, 4 s left",
        "preparing: 4 of 4 scans, 0.2 a second, 0 s left",
    ]


def test_what_is_quick_can_say_nothing_and_what_is_slow_says_no_end(clock, caplog):
    quick = with_lines(clock.tasks(1, 1), 2, doing="segmenting", unit="windows", says_end=False)
    assert lines(caplog, quick) == []
    slow = with_lines(clock.tasks(90, 90, 90), 3, doing="segmenting", unit="windows", says_end=False)
    assert lines(caplog, slow) == [
        "segmenting: 1 of 3 windows, 0.7 a minute, 3 min left",
        "segmenting: 2 of 3 windows, 0.7 a minute, 90 s left",
    ]


def test_durations_are_words():
    assert [duration(seconds) for seconds in (0.4, 99, 100, 5940, 9000)] == ["0 s", "99 s", "2 min", "99 min", "2.5 h"]
