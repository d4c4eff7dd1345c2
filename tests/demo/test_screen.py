# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The bar shows step, loss and time left, and its estimate follows the pace of the stages so far."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from demo.screen import STEP_LINE, Screen, estimate
from demo.stage import Stage


def test_estimate_before_anything_is_known_is_what_was_expected():
    share, left = estimate({"a": 10, "b": 30}, {}, "a", elapsed=0, stage_left=None)
    assert (share, left) == (0, 40)


def test_estimate_follows_the_pace_of_the_stages_so_far():
    # a took twice as long as expected, so b (30) should take 60, of which 15 have passed
    share, left = estimate({"a": 10, "b": 30}, {"a": 20}, "b", elapsed=15, stage_left=None)
    assert left == pytest.approx(45)
    assert share == pytest.approx((10 + 30 * 15 / 60) / 40)


def test_estimate_believes_the_running_stage():
    # b reports 20 s left after 10 s: together with a (10 of 10) the pace is 40/40, so c should take 40
    share, left = estimate({"a": 10, "b": 30, "c": 40}, {"a": 10}, "b", elapsed=10, stage_left=20)
    assert left == pytest.approx(20 + 40)
    assert share == pytest.approx((10 + 30 / 3) / 80)


def test_screen_shows_step_loss_and_time_left():
    shown = io.StringIO()
    stage = Stage(name="one", title="Stage one", command=["-c", ""], outputs=[], seconds=100)
    screen = Screen([stage], Console(file=shown, width=200), every=0)
    screen.begin(stage, resumed=False)
    screen.update(
        "23:03:01 step 5/12  loss 4.1183 inpainting 0.4916 contrast 1.9346 rotation 1.6921  lr 4.17e-04  3.91 crops/s  "
        "left 0:07\n23:03:06 step 10/12  loss 3.9158 inpainting 0.3827  lr 8.33e-04  3.78 crops/s  left 1:02\n"
    )
    line = shown.getvalue().splitlines()[-1]
    assert "step 10/12, loss 3.916" in line
    assert "[0:00, 1:04 left]" in line


def test_step_lines_of_the_bundles_are_understood():
    """No other test connects the format of `log.TrainingLog` to the demo."""
    from bundles.common.training import log as training_log

    source = open(training_log.__file__).read()
    form = re.search(r'"(step %d/%d[^"]*)"', source)[1]
    line = form % (5, 12, "loss 4.1 inpainting 0.5", 1e-3, 3.9, "1:00:07")
    assert STEP_LINE.search(line).groups() == ("5", "12", "4.1", "1:00:07")
