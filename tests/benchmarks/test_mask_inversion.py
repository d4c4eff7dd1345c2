# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The mask inversion benchmark runs each way and reports its numbers."""

from __future__ import annotations

import json
import os
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch

from benchmarks import mask_inversion
from benchmarks.mask_inversion import GIB, REFERENCE, WAYS, _in_a_process, _rows, dice_of_organs, main

TINY = ["--shape", "40", "36", "24", "--classes", "3"]


@pytest.fixture(autouse=True)
def as_spawned(monkeypatch):
    """In a spawned process MONAI inverts transforms by class name; in this one it would require the same objects."""
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda **_: "spawn")


@pytest.fixture
def here(monkeypatch):
    """Run every way in this process: importing MONAI in five more processes takes a minute."""
    monkeypatch.setattr(
        mask_inversion, "_in_a_process", lambda function, *given, **options: function(*given, **options)
    )


def test_command_prints_a_row_per_way_and_writes_the_numbers(here, tmp_path, capsys):
    assert main([*TINY, "--json", str(tmp_path / "out/ways.json")]) == 0
    table = capsys.readouterr().out
    assert "3 classes on 22 x 20 x 12 voxels of 1.5 x 1.5 x 2 mm, to 40 x 36 x 24 of 0.8 x 0.8 x 1 mm" in table
    assert all(way in table for way in WAYS)
    results = json.loads((tmp_path / "out/ways.json").read_text())
    assert results["model_shape"] == [22, 20, 12] and list(results["ways"]) == list(WAYS)
    ways = results["ways"]
    assert ways[REFERENCE]["dice_mean"] == 1 and ways[REFERENCE]["different"] == 0
    assert ways["MaskOnScanGridd, linear"]["dice_min"] > 0.999
    assert 0 < ways["MaskOnScanGridd, nearest"]["different"] < 0.2
    assert all(way["peak"] > 2**26 and way["seconds"] > 0 for way in ways.values())


def test_without_the_reference_there_are_no_ratios(here, capsys):
    assert main([*TINY, "--ways", "MaskOnScanGridd, linear"]) == 0
    table = capsys.readouterr().out
    assert "MaskOnScanGridd, linear" in table and "ratio" not in table and "Dice" not in table


def test_a_way_that_runs_out_of_memory_leaves_the_others_their_rows(monkeypatch, capsys):
    def in_a_process(function, *given, **options):
        if given[0] == REFERENCE:
            raise BrokenProcessPool
        return function(*given, **options)

    monkeypatch.setattr(mask_inversion, "_in_a_process", in_a_process)
    assert main(TINY) == 0
    table = capsys.readouterr().out
    assert "killed" in table and all(way in table for way in WAYS)


def test_processes_are_new_and_may_die():
    assert _in_a_process(os.getpid) not in (os.getpid(), _in_a_process(os.getpid))
    with pytest.raises(BrokenProcessPool):
        _in_a_process(os._exit, 1)


def test_dice_is_that_of_each_organ():
    one = np.array([[[1, 1, 2, 0]], [[1, 0, 0, 0]]], dtype=np.uint8)
    other = np.array([[[1, 2, 2, 0]], [[0, 0, 0, 0]]], dtype=np.uint8)
    np.testing.assert_allclose(dice_of_organs(one, other, classes=4), [2 * 1 / (3 + 1), 2 * 1 / (1 + 2), np.nan])


def test_a_row_states_its_numbers_in_the_units_of_its_headings():
    reference = {
        "seconds": 50.0,
        "peak": 12 * GIB,
        "above": 10 * GIB,
        "dice_mean": 1.0,
        "dice_min": 1.0,
        "different": 0.0,
    }
    other = {"seconds": 5.0, "peak": 2 * GIB, "above": GIB, "dice_mean": 0.99, "dice_min": 0.9, "different": 0.01}
    row = _rows({REFERENCE: reference, "MaskOnScanGridd, linear": other})[1]
    assert {heading.replace("\n", " "): cell for heading, cell in row.items()} == {
        "way": "MaskOnScanGridd, linear",
        "peak GiB": "2.00",
        "above GiB": "1.00",
        "above ratio": "0.100",
        "seconds": "5.0",
        "time ratio": "0.10",
        "Dice mean": "0.99000",
        "Dice min": "0.90000",
        "different voxels": "1.0000%",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "0", "9", "9"], "--shape [0, 9, 9]"),
        (["--spacing", "1", "-1", "1"], "--spacing [1.0, -1.0, 1.0]"),
        (["--classes", "1"], "--classes 1"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_bad_input_ends_with_one_message(capsys, arguments, words):
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("Stopped: ") and words in message
