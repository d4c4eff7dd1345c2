# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The real command, from raw scans to a data set for training: kills, bad scans, a full disk and misspelt options."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from bundles.pretraining.crops.patch_store import StoredScan

from ..common.scans.raw_scans import MIN_BODY, contents, phantom, read_list, write_bad, write_good, write_nifti
from .command_line import SMALL, command, kill_when, run_bundle, start, succeed

BUNDLE = "swin_unetr_pretrain"


def options(source: Path, out: Path, **others) -> dict:
    return {"source": source, "dataset_dir": out, "min_body": MIN_BODY, "folds": 2, **others}


def prepared(source: Path, out: Path, *, status: int = 0, **others) -> subprocess.CompletedProcess:
    run = run_bundle(BUNDLE, "prepare.yaml", **options(source, out, **others))
    assert run.returncode == status, f"status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-5000:]}"
    assert "Traceback" not in run.stderr
    return run


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Good and bad scans, with enough good ones to leave time for a kill."""
    folder = tmp_path_factory.mktemp("hospital") / "raw"
    write_good(folder)
    write_bad(folder)
    for seed in range(100, 112):
        write_nifti(folder / "more scans" / f"{seed}.nii.gz", seed)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, raw) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    run = prepared(raw, out, status=3, workers=2)
    assert "17 of 34 scans used, 17 left out" in run.stdout.splitlines()[-1]
    return out


def test_the_result_is_whole_and_its_store_is_the_scan(unbroken):
    content = read_list(unbroken)
    assert len(content["training"]) + len(content["validation"]) == 17
    stored = StoredScan(unbroken / "store" / "raw__more_scans__105.b2nd")
    np.testing.assert_array_equal(stored.read((slice(None),) * 3), phantom(105)[::-1, ::-1])


@pytest.mark.parametrize("appears", ["store/raw__more_scans__100.b2nd", "audit.csv"])
def test_killed_and_run_again_it_ends_as_unbroken(tmp_path, raw, unbroken, appears):
    out = tmp_path / "out"
    kill_when(BUNDLE, "prepare.yaml", appears=out / appears, **options(raw, out, workers=2))
    run = prepared(raw, out, status=3, workers=1)
    assert contents(out) == contents(unbroken)
    assert "17 of 34 scans used" in run.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_end_it_cleanly(tmp_path, raw, unbroken, number):
    out = tmp_path / "out"
    process = start(BUNDLE, "prepare.yaml", **options(raw, out, workers=2))
    while not (out / "store").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "run the same command again to continue" in output and "Traceback" not in output
    assert not [name for name in contents(out) if Path(name).name.startswith(".")]
    prepared(raw, out, status=3, workers=0)
    assert contents(out) == contents(unbroken)


def test_a_full_disk_stops_it_with_advice_and_it_goes_on_afterwards(tmp_path, raw, unbroken):
    """A limit on the size of files simulates the full disk."""
    out = tmp_path / "out"
    limited_run = command(BUNDLE, "prepare.yaml", **options(raw, out, workers=2))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    run = subprocess.run(**limited_run, capture_output=True, text=True, timeout=300, check=False, preexec_fn=limited)
    assert run.returncode == 1, run.stderr[-3000:]
    assert "Traceback" not in run.stderr
    message = run.stderr[run.stderr.rindex("Stopped:") :]
    assert "Cannot write" in message and str(out) in message and "same command" in message
    assert not [name for name in contents(out) if Path(name).name.startswith(".")]
    prepared(raw, out, status=3)
    assert contents(out) == contents(unbroken)


def test_all_scans_used_is_status_0_and_a_second_run_does_nothing(tmp_path):
    write_good(tmp_path / "raw data")
    prepared(tmp_path / "raw data", tmp_path / "out")
    first = contents(tmp_path / "out")
    run = prepared(tmp_path / "raw data", tmp_path / "out")
    assert "4 already prepared" in run.stdout
    assert contents(tmp_path / "out") == first


def test_what_it_writes_trains(tmp_path, unlabelled):
    prepared(unlabelled, tmp_path / "data", cwd=tmp_path, collection="LIDC")
    output = tmp_path / "output"
    run = run_bundle(
        BUNDLE, "train.yaml", **{**SMALL, "roi_size": "[64,64,32]"}, dataset_dir=tmp_path / "data", output_dir=output
    )
    succeed(run)
    assert (output / "models" / "encoder.pt").is_file()


@pytest.mark.parametrize(("others", "words"), [({"sorce": "x"}, "--source"), ({"source": "nowhere"}, "nowhere")])
def test_bad_options_stop_it_with_one_message(tmp_path, raw, others, words):
    run = run_bundle(BUNDLE, "prepare.yaml", **{**options(raw, tmp_path / "out"), **others})
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert words in run.stderr[run.stderr.rindex("Stopped:") :]
    assert not (tmp_path / "out" / "dataset.json").exists()
