# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Only one process at a time holds a run, and a dead process does not block it."""

from __future__ import annotations

import json
import os
import time
from multiprocessing import get_context

import pytest

from evidence.runs import run_claim as claims
from evidence.runs.run_claim import ClaimLost


def test_a_run_is_held_by_one_process_until_it_is_released(tmp_path):
    held = claims.take(tmp_path)
    assert held and claims.take(tmp_path) is None and claims.is_held(tmp_path)
    held.release()
    assert not claims.is_held(tmp_path)
    assert claims.take(tmp_path)


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path):
    process = get_context("fork").Process(target=claims.take, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / ".claim.1").exists()
    assert claims.take(tmp_path).path.name == ".claim.2"


def test_a_silent_claim_of_another_machine_is_taken_over_when_it_is_stale(tmp_path):
    path = tmp_path / ".claim.1"
    path.write_text(json.dumps({"machine": "another/1", "pid": os.getpid()}))
    assert claims.take(tmp_path) is None
    past = time.time() - claims.STALE - 5
    os.utime(path, (past, past))
    assert claims.take(tmp_path).path.name == ".claim.2"


def test_a_holder_that_was_taken_over_is_told(tmp_path):
    held = claims.take(tmp_path)
    past = time.time() - claims.STALE - 5
    os.utime(held.path, (past, past))
    other = claims.take(tmp_path)
    with pytest.raises(ClaimLost):
        held.beat()
    other.beat()


def test_beats_keep_a_claim(tmp_path):
    held = claims.take(tmp_path)
    past = time.time() - claims.STALE - 5
    os.utime(held.path, (past, past))
    held.beat()
    assert claims.take(tmp_path) is None


def take_all(folder, queue, start, stop):
    start.wait()
    got = [i for i in range(40) if claims.take(folder / str(i))]
    queue.put(got)
    stop.wait()  # stay alive while the others look


def test_processes_at_once_never_get_the_same_run(tmp_path):
    context = get_context("fork")
    queue, start, stop = context.Queue(), context.Event(), context.Event()
    workers = [context.Process(target=take_all, args=(tmp_path, queue, start, stop)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    got = [queue.get(timeout=60) for _ in workers]
    stop.set()
    for worker in workers:
        worker.join()
    assert sorted(sum(got, [])) == list(range(40))
