# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Sides run in turns, each in its own process; the counted and measured numbers are right."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.side_by_side import (
    MIB,
    Comparison,
    Floor,
    Side,
    Work,
    compare,
    floor,
    in_a_process,
    limit_seconds,
    machine,
    machine_line,
    print_table,
    resident_bytes,
    work,
    write_json,
)

# ---- sides (a spawned process imports them from here) ----


def sleeper(name, seconds, diary):
    """A side that records each run and its process."""

    def timed():
        with open(diary, "a") as lines:
            lines.write(f"{name} {os.getpid()}\n")
        time.sleep(seconds)
        return name

    return timed


def holder(*, prepared, running):
    """A side that holds ``prepared`` MiB from its preparation on, and ``running`` MiB more while it runs."""
    kept = torch.ones(prepared * MIB, dtype=torch.uint8)
    first = [True]

    def timed():
        size = running + 500 * first.pop() if first else running  # the first run takes more, but is not timed
        return int(torch.ones(size * MIB, dtype=torch.uint8)[0] + kept[0])

    return timed


def out_of_memory():
    def timed():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return timed


def killed():
    return partial(os._exit, 9)


def broken():
    raise KeyError("no such weights")


def threads():
    return torch.get_num_threads


# ---- tests ----


def test_sides_alternate_in_processes_of_their_own_and_the_order_turns_round(tmp_path):
    diary = str(tmp_path / "diary")
    sides = {"quick": partial(sleeper, "quick", 0.01, diary), "slow": partial(sleeper, "slow", 0.1, diary)}
    comparison = compare(sides, reference="slow", runs=3, warmup=1, results=True)
    lines = [line.split() for line in Path(diary).read_text().splitlines()]
    assert [name for name, _ in lines] == ["quick", "slow", "slow", "quick"] * 2
    assert len({pid for _, pid in lines}) == len({tuple(line) for line in lines}) == 2
    assert str(os.getpid()) not in {pid for _, pid in lines}
    quick, slow = comparison.sides["quick"], comparison.sides["slow"]
    assert len(quick.seconds) == 3 and 0.01 <= quick.median < 0.1 <= slow.median < 1
    assert 1.5 < comparison.ratio("quick") <= 15 and comparison.ratio("slow") == 1
    assert quick.result == "quick" and slow.result == "slow"


def test_memory_is_that_of_the_timed_runs_above_the_imports():
    sides = {"much": partial(holder, prepared=20, running=200), "little": partial(holder, prepared=20, running=60)}
    comparison = compare(sides, reference="much", runs=2)
    for name, expected in (("much", 220), ("little", 80)):
        side = comparison.sides[name]
        assert expected - 8 < side.above / MIB < expected + 30
        assert side.peak > side.above + 50 * MIB  # Python and PyTorch
    assert 0.3 < comparison.memory_ratio("little") < 0.5


def test_a_side_without_enough_memory_leaves_the_others_their_numbers(capsys):
    sides = {"refused": out_of_memory, "killed": killed, "alive": threads}
    comparison = compare(sides, reference="refused", runs=2, threads=1, results=True)
    assert comparison.sides["alive"].result == comparison.threads == 1
    assert comparison.ratio("alive") is None and comparison.memory_ratio("alive") is None
    for dead in ("refused", "killed"):
        assert comparison.sides[dead] is None and comparison.as_dict()["sides"][dead] is None
    print_table(comparison.rows())
    assert "out of memory" in capsys.readouterr().out


def test_other_errors_of_a_side_are_raised():
    with pytest.raises(KeyError, match="no such weights"):
        compare({"broken": broken}, runs=1)
    with pytest.raises(ValueError, match="'theirs' must be one of ours"):
        compare({"ours": threads}, reference="theirs")


def by_hand() -> Comparison:
    """A comparison on a machine that gets slower with each round, which must not affect the ratios within a round."""
    ours = Side(seconds=(1.0, 2.0, 9.0), peak=300 * MIB, above=100 * MIB)
    stock = Side(seconds=(2.0, 4.0, 8.0), peak=400 * MIB, above=200 * MIB)
    return Comparison(sides={"ours": ours, "stock": stock}, reference="stock", device="cpu", threads=2)


def test_the_ratio_is_the_median_of_the_rounds(tmp_path, capsys):
    comparison = by_hand()
    assert comparison.ratio("ours") == 2 and comparison.memory_ratio("ours") == 0.5
    print_table(comparison.rows({"ours": 0.5}), title="Two sides")
    shown = capsys.readouterr().out
    assert "Two sides" in shown and "25%" in shown and "1 – 9" in shown and "2.00" in shown and "0.50" in shown
    write_json(tmp_path / "made/out.json", comparison.as_dict())
    written = json.loads((tmp_path / "made/out.json").read_text())
    assert written["sides"]["ours"] == {
        "seconds": [1, 2, 9],
        "median": 2,
        "ratio": 2,
        "peak": 300 * MIB,
        "above": 100 * MIB,
        "memory_ratio": 0.5,
    }
    assert written["reference"] == "stock" and written["threads"] == 2


def test_work_of_a_matrix_product_and_of_attention():
    a, b = torch.rand(30, 20), torch.rand(20, 10)
    assert work(lambda: a @ b) == Work(flops=2 * 30 * 20 * 10, bytes=4 * (30 * 20 + 20 * 10 + 30 * 10))
    # A view moves nothing; an expanded row is read once; the result is written in full.
    assert work(lambda: a.t().reshape(20, 30)[:, :1].expand(20, 7)) == Work(flops=0, bytes=0)
    assert work(lambda: a + a[:1]).bytes == 4 * (30 * 20 + 20 + 30 * 20)
    assert work(lambda: a.mul_(2)).bytes == 4 * 2 * 30 * 20

    q, k, v = (torch.rand(2, 3, 50, 8, requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = 2 * (2 * 2 * 3 * 50 * 50 * 8)  # scores, and their product with the values
    assert work(lambda: attention(q, k, v)).flops == forward
    backward = 5 * forward // 2  # five products, one of them recomputed
    assert work(lambda: attention(q, k, v).sum().backward()).flops == forward + backward


def test_floor_is_what_the_machine_does_and_limits_the_work():
    best = in_a_process(floor, torch.float32, threads=1, seconds=0.05)
    assert 1e9 < best.matmul < 1e13 and 1e8 < best.conv < 1e13 and 1e8 < best.copy < 1e13
    known = Floor(matmul=200.0, conv=100.0, copy=10.0)
    assert limit_seconds(Work(flops=1000, bytes=10**6), known) == 5
    assert limit_seconds(Work(flops=1000, bytes=10**6), Floor(matmul=100.0, conv=500.0, copy=10.0)) == 2


def test_the_machine_is_named():
    here = machine()
    assert here["cores"] >= 1 and here["memory"] > 2**28 and here["cpu"]
    assert (
        here["versions"]["torch"] == torch.__version__.split("+")[0] or here["versions"]["torch"] == torch.__version__
    )
    shown = machine_line(here | {"gpu": "A GPU", "cpu": "A CPU"})
    assert shown.startswith("A GPU; A CPU, ") and f"torch {here['versions']['torch']}" in shown
    assert 0 < resident_bytes("VmRSS") <= resident_bytes("VmHWM")
