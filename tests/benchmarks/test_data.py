# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The data benchmark: each way gives the right crops, and the reported numbers are the measured ones."""

from __future__ import annotations

import json
import statistics
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from benchmarks import data
from benchmarks.data import GIB, MIB, _heading, _length_rows, _rows, compare, main, memory_of_lists
from benchmarks.loading import process as loading_process
from benchmarks.loading import ways
from benchmarks.loading.process import LoadingProcess
from benchmarks.loading.scans import find_scans, make_scan, store_scans
from benchmarks.loading.ways import (
    CACHED,
    EQUAL,
    MIN_BODY,
    NIFTI,
    OFFICIAL,
    PERSISTENT,
    STORE,
    WAYS,
    WINDOWED,
    Job,
    Loader,
    bundle_preprocessing,
    drop_from_cache,
    stays_in_cache,
)
from bundles.common.data.foreground import above_or_all
from bundles.pretraining.crops.hu_window import intensities

SHAPE, ROI = (48, 40, 36), (32, 32, 32)
TRAIN = Path(data.__file__).resolve().parents[1] / "bundles/swin_unetr_pretrain/configs/train.yaml"


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Fork the processes, so that they need not import PyTorch and MONAI again."""
    monkeypatch.setattr(loading_process, "START", "fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for number in range(2):
        make_scan(folder / f"scan_{number}.nii.gz", shape=SHAPE, seed=number)
    return folder


@pytest.fixture(scope="module")
def job(folder, tmp_path_factory):
    scans = sorted(map(str, folder.iterdir()))
    out = tmp_path_factory.mktemp("made")
    return Job(
        scans=tuple(scans), stored=tuple(store_scans(scans, str(out))), cache=f"{out}/cache", roi_size=ROI, crops=2
    )


def test_command_measures_every_way_and_writes_the_numbers(folder, tmp_path, capsys):
    options = ["--roi_size", *map(str, ROI), "--repeats", "3", "--list_lengths", "2", "6"]
    assert main([str(folder), *options, "--json", str(tmp_path / "out/data.json")]) == 0
    table = capsys.readouterr().out
    assert "2 scans (48x40x36, 48x40x36), 2 crops of 32 x 32 x 32 per draw; rounds: 3;" in table
    assert "warm: every file was read before" in table and "cold" not in table
    assert "bit-identical in all 2 compared draws" in table
    assert all(way in table for way in WAYS) and "6 times" in table

    results = json.loads((tmp_path / "out/data.json").read_text())
    assert list(results["ways"]) == list(WAYS)
    official = results["ways"][OFFICIAL]
    for way in results["ways"].values():
        assert len(way["seconds"]) == 3
        assert way["crops_per_second"] == pytest.approx(2 * 2 / statistics.median(way["seconds"]))
        assert way["ratio"] == pytest.approx(way["crops_per_second"] / official["crops_per_second"])
        assert way["peak"] > way["above"] >= 0
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {scan["file"]: scan["bytes"] for scan in results["scans"]} == files
    assert official["bytes"] == results["ways"][NIFTI]["bytes"] == sum(files.values())
    assert results["ways"][STORE]["bytes"] == results["made"]["store"]["bytes"] > 0
    assert results["ways"][PERSISTENT]["bytes"] > 2 * 4 * 64**3  # float32, in multiples of the crop
    assert results["machine"]["cores"] >= 1 and results["machine"]["memory"] > GIB // 4
    assert results["versions"]["torch"] == torch.__version__
    assert (results["cold"], results["not_dropped"], results["draws_compared"]) == (False, [], 2)
    lists = results["list_lengths"]
    assert lists["draws"] == 12 and [length["listed"] for length in lists["lengths"].values()] == [4, 12]


def test_crops_are_batches_and_those_of_the_bundle_equal(job):
    drawn = {way: [Loader(way, job).draw(number) for number in range(3)] for way in WAYS}
    hu = drawn.pop(STORE)
    assert all(crops.dtype == torch.int16 and crops.min() < -900 and crops.max() > 50 for crops in hu)
    assert all(torch.equal(intensities(hu[number], (-1000, 1000)), drawn[WINDOWED][number]) for number in range(3))
    for batches in drawn.values():
        for batch in batches:
            assert batch.shape == (2, 1, *ROI) and batch.dtype == torch.float32
            assert batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.05
    for number in range(3):
        assert all(torch.equal(drawn[way][number], drawn[NIFTI][number]) for way in (CACHED, WINDOWED))
    assert not torch.equal(drawn[NIFTI][0], drawn[NIFTI][2])  # two draws from the same scan


def test_persistent_dataset_gives_the_crops_of_the_official_chain(job):
    official, persistent = Loader(OFFICIAL, job), Loader(PERSISTENT, job)
    for number in range(4):
        torch.testing.assert_close(persistent.draw(number), official.draw(number).as_tensor(), rtol=0, atol=0)


def test_hashes_are_those_of_the_crops_in_the_window(job):
    hashes = {way: Loader(way, job).draw_all(range(3), cold=False, hashes=True)[1] for way in WAYS}
    assert all(hashes[way] == hashes[NIFTI] for way in EQUAL)
    assert len({*hashes[NIFTI], *hashes[OFFICIAL]}) == 6


def test_preprocessing_is_that_of_training():
    config = yaml.safe_load(TRAIN.read_text())
    written = [step for step in config["preprocessing"]["transforms"] if step["_target_"] != "Spacingd"]
    ours = bundle_preprocessing().transforms
    assert [type(step).__name__ for step in ours] == [step["_target_"].rpartition(".")[2] for step in written]
    crop, scale = ours[3], ours[4].scaler
    assert isinstance(crop.cropper.select_fn, partial) and crop.cropper.select_fn.func is above_or_all
    assert crop.cropper.select_fn.keywords == {"other": config["foreground_hu"]}
    assert [scale.a_min, scale.a_max, scale.b_min, scale.b_max, scale.clip] == [*config["hu_window"], 0, 1, True]
    assert MIN_BODY == config["min_body"] and config["crops_per_volume"] == 2


def test_crops_that_differ_end_the_run(folder, monkeypatch):
    def swapped(scans, out):
        return store_scans(scans[::-1], out)

    monkeypatch.setattr(data, "store_scans", swapped)
    with pytest.raises(RuntimeError, match="Draw 0, .*scan_0.nii.gz: the crops of 'NIfTI' differ"):
        compare(sources=[str(folder)], roi_size=ROI, repeats=1)


def test_a_way_that_is_killed_or_too_large_leaves_the_others_their_rows(folder, monkeypatch, capsys):
    class Killed(LoadingProcess):
        def __init__(self, way, job):
            if way == OFFICIAL:
                raise BrokenProcessPool
            super().__init__(way, job)

    monkeypatch.setattr(data, "LoadingProcess", Killed)
    monkeypatch.setattr(data, "_from_proc", lambda path, name: MIB // 4)  # two scans take 0.53 MiB as float32
    assert main([str(folder), "--roi_size", *map(str, ROI), "--repeats", "1"]) == 0
    table = capsys.readouterr().out
    assert "official chain: killed by the system" in table and "NIfTI, all cached: needs 0.0 GiB, more" in table
    assert table.count("skipped") == 2 and all(way in table for way in WAYS) and "ratio" not in table


def test_process_that_dies_is_told(job):
    with LoadingProcess(STORE, job) as process:
        seconds, hashes = process.draw_all(range(2), hashes=True)
        assert seconds > 0 and len(set(hashes)) == 2
        with pytest.raises(BrokenProcessPool):
            process.pool.submit(data.os._exit, 1).result()


def test_memory_of_the_store_does_not_grow_with_the_list_and_that_of_a_cache_does(tmp_path):
    scan = str(tmp_path / "scan.nii.gz")
    make_scan(scan, shape=(128, 128, 64), seed=0)
    options = {"stored": tuple(store_scans([scan], str(tmp_path))), "cache": "", "roi_size": ROI, "crops": 2}
    results = memory_of_lists(Job(scans=(), **options), [2, 40], str(tmp_path))
    assert results["draws"] == 40
    few, many = results["lengths"]["2"], results["lengths"]["40"]
    assert (few["listed"], many["listed"]) == (2, 40)
    assert many["above"] < few["above"] + 8 * MIB

    def cached(length):
        with LoadingProcess(CACHED, Job(scans=(scan,) * length, **options)) as process:
            process.draw_all(range(length))
            return process.memory()

    assert cached(40)["above"] > cached(2)["above"] + 60 * MIB  # 38 more float32 body crops


def test_cold_drops_each_file_of_the_way_before_each_draw(job, monkeypatch):
    dropped = []
    monkeypatch.setattr(ways, "drop_from_cache", dropped.append)
    Loader(STORE, job).draw_all(range(3), cold=True, hashes=False)
    assert dropped == list(job.stored) * 3
    Loader(NIFTI, job).draw_all(range(1), cold=False, hashes=False)
    assert len(dropped) == 6


def test_a_file_that_stays_in_memory_is_seen(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(bytes(10**6))
    dropped = not stays_in_cache(str(file))
    monkeypatch.setattr(ways, "drop_from_cache", lambda file: Path(file).read_bytes())
    assert stays_in_cache(str(file))
    if not dropped:
        pytest.skip("the temporary folder is in memory")
    drop_from_cache(str(file))
    assert file.read_bytes() == bytes(10**6)


def test_scans_are_taken_evenly(tmp_path):
    for number in range(5):
        make_scan(tmp_path / f"{number}.nii.gz", shape=(8, 8, 8), seed=number)
    assert [Path(scan).name for scan in find_scans([str(tmp_path)], 3)] == ["0.nii.gz", "2.nii.gz", "4.nii.gz"]
    assert len(find_scans([str(tmp_path)], 9)) == 5


def test_generated_scan_is_a_body_in_air(tmp_path):
    make_scan(tmp_path / "one.nii.gz", shape=(64, 60, 40), seed=3)
    image = nib.load(tmp_path / "one.nii.gz")
    voxels = np.asarray(image.dataobj)
    assert (
        voxels.dtype == np.int16 and voxels.shape == (64, 60, 40) and nib.aff2axcodes(image.affine) == ("L", "P", "S")
    )
    assert abs(np.median(voxels[28:36, 26:34, 16:24]) - 40) < 150 and voxels[:3].max() < -900
    middle = (voxels[:, :, 20] > -500).mean()
    assert middle == pytest.approx(np.pi / 4 * 0.8 * 0.55, abs=0.02)  # an ellipse with these axes
    assert (voxels[:, :, 0] > -500).mean() < 0.7 * middle
    make_scan(tmp_path / "two.nii.gz", shape=(64, 60, 40), seed=4)
    assert not np.array_equal(voxels, nib.load(tmp_path / "two.nii.gz").dataobj)


def test_rows_state_their_numbers_in_the_units_of_their_headings():
    way = {"seconds": [0.5, 0.4, 0.8], "crops_per_second": 8.0, "ratio": 40.0}
    way |= {"peak": 700 * MIB, "above": 100 * MIB, "bytes": 50 * MIB}
    rows = _rows({STORE: way, CACHED: {"left_out": "too large"}}, 4)
    assert {heading.replace("\n", " "): cell for heading, cell in rows[0].items()} == {
        "way": "store",
        "crops/s": "8",
        "min – max": "5 – 10",
        "ratio": "40",
        "ms per crop": "125",
        "peak MiB": "700",
        "above MiB": "100",
        "on disk MiB": "50",
    }
    assert rows[1] == {"way": "NIfTI, all cached", "crops/s": "skipped"}
    lengths = {"10": {"listed": 20, "peak": 600 * MIB, "above": 40 * MIB}}
    lengths["100"] = {"listed": 200, "peak": 630 * MIB, "above": 70 * MIB}
    rows = _length_rows({"draws": 200, "lengths": lengths})
    assert {heading.replace("\n", " "): cell for heading, cell in rows[1].items()} == {
        "listed": "100 times",
        "scans": "200",
        "draws": "200",
        "peak MiB": "630.0",
        "peak ratio": "1.050",
        "above MiB": "70.0",
        "above ratio": "1.750",
    }


def test_heading_says_what_was_cold_and_what_would_not_be():
    results = {
        "machine": {"cpu": "A CPU", "cores": 2, "memory": 24 * GIB, "load": 1.25},
        "versions": {"python": "3.11", "torch": "2"},
        "scans": [{"shape": [512, 512, 41]}],
        "crops": 2,
        "roi_size": [96, 96, 96],
        "repeats": 5,
        "cold": True,
        "made": {"store": {"seconds": 1.5, "bytes": 9 * MIB}, "cache": {"seconds": 2, "bytes": 90 * MIB}},
        "not_dropped": [],
        "draws_compared": 1,
    }
    lines = _heading(results, generated=True)
    assert lines[0].startswith("1 generated scan (512x512x41), 2 crops of 96 x 96 x 96 per draw; rounds: 5;")
    assert lines[1] == "A CPU, 2 cores, 24 GiB, load 1.2" and lines[2] == "python 3.11, torch 2"
    assert lines[3] == "cold: each way's files are dropped from the page cache before each draw"
    assert lines[4] == "store prepared in 1.5 s: 9 MiB"
    assert "BUT 1 OF THEM STAYED IN IT" in _heading(results | {"not_dropped": ["a.b2nd"]}, generated=True)[3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--crops", "0"], ["--crops 0"]),
        (["--repeats", "0"], ["--repeats 0"]),
        (["--roi_size", "32", "0", "32"], ["--roi_size [32, 0, 32]"]),
        (["--list_lengths", "10", "-1"], ["--list_lengths [10, -1]"]),
        (["no/such/folder"], ["no/such/folder not found"]),
    ],
)
def test_bad_input_ends_with_one_message(capsys, arguments, words):
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("Stopped: ") and all(word in message for word in words)


def test_a_bad_folder_is_refused_with_the_file_and_the_reason(folder, tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert f"No scans in {tmp_path}" in capsys.readouterr().err
    whole = (folder / "scan_0.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.nii.gz").write_bytes(whole)
    assert main([str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "cut.nii.gz cannot be read, perhaps damaged or cut short" in message and "Fix it" in message
