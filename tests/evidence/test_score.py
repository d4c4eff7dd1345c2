# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""One run with a damaged file costs no other run its scores."""

from __future__ import annotations

import pytest

from bundles.common.errors import InputError
from evidence import score


def test_the_other_runs_are_scored_before_the_damaged_one_is_told(tmp_path, monkeypatch):
    finished = []

    def finish(run, folder):
        if run == "b":
            raise KeyError("dice")
        finished.append(run)

    monkeypatch.setattr(score, "read_plan", lambda out: {"runs": {name: {"commands": []} for name in "abc"}})
    monkeypatch.setattr(score, "planned_run", lambda plan, name, out: name)
    monkeypatch.setattr(score, "finish", finish)
    with pytest.raises(
        InputError, match=r"1 run cannot be scored:\nb: a file in .*/runs/b is damaged \(KeyError: 'dice'\)"
    ):
        score.score_ended(tmp_path)
    assert finished == ["a", "c"]
