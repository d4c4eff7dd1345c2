# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The sides segment the same scan with the same weights, and the benchmark reports each of them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks import inference
from benchmarks.inference import (
    BODY,
    DEFAULT_SIDES,
    FIELD_OF_VIEW,
    OPENVINO,
    OURS,
    PLAIN,
    ZOO,
    Job,
    convert_once,
    dice_of_classes,
    main,
    make_network,
    model_values,
    prepare,
    window_work,
)
from benchmarks.loading.scans import make_scan
from benchmarks.side_by_side import MIB, Comparison, Floor, Side
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.common.weights.encoder_record import read_record
from bundles.segmentation.inference.sliding_window import window_places

from ..segmentation.backend.conftest import needs_openvino

SIZE = (60, 60, 32)
SMALL = (320.0, 320.0, 150.0)  # mm


@pytest.fixture(autouse=True)
def as_spawned(monkeypatch):
    """In a spawned process MONAI inverts transforms by class name; in this one it would require the same objects."""
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda **_: "spawn")


@pytest.fixture
def values():
    """The preset cpu with one block per stage."""
    values = model_values("cpu")
    values["encoder"] |= {"depths": [1, 1, 1, 1]}
    return values


@pytest.fixture
def job(tmp_path, values):
    spacing = [extent / voxels for extent, voxels in zip(SMALL, SIZE, strict=True)]
    make_scan(tmp_path / "ct.nii.gz", shape=SIZE, seed=0, spacing=spacing, ellipsoid=BODY)
    return Job(scan=str(tmp_path / "ct.nii.gz"), overlap=0.5, device="cpu", folder=str(tmp_path), **values)


@pytest.fixture
def here(monkeypatch, values):
    """Run all sides in this process, once: importing MONAI in seven more processes takes a minute."""

    def compare(sides, *, reference, runs, device, **_):
        measured = {
            name: Side(seconds=(2.0,) * runs, peak=900 * MIB, above=300 * MIB, result=prepare()())
            for name, prepare in sides.items()
        }
        return Comparison(sides=measured, reference=reference, device=device, threads=1)

    monkeypatch.setattr(inference, "compare", compare)
    monkeypatch.setattr(inference, "in_a_process", lambda function, *given, **options: function(*given, **options))
    monkeypatch.setattr(inference, "floor", lambda *_, **__: Floor(matmul=1e9, conv=2e9, copy=1e10))
    monkeypatch.setattr(inference, "model_values", lambda model: values)
    monkeypatch.setattr(inference, "FIELD_OF_VIEW", SMALL)


def test_sides_have_the_same_weights_and_give_label_maps_of_the_scan(job):
    networks = {side: make_network(side, job) for side in DEFAULT_SIDES}
    weights = networks[ZOO].state_dict()
    for side, network in networks.items():
        assert not network.training and network.state_dict().keys() == weights.keys()
        assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items()), side
    assert type(networks[PLAIN].swinViT) is type(networks[ZOO].swinViT) is not type(networks[OURS].swinViT)

    runs = {side: prepare(side, job)() for side in DEFAULT_SIDES}
    for run in runs.values():
        assert run["labels"].shape == SIZE and run["labels"].dtype == np.uint8
        assert len(np.unique(run["labels"])) > 1 and all(seconds > 0 for seconds in run["seconds"].values())
    assert (runs[OURS]["labels"] == runs[PLAIN]["labels"]).mean() >= 0.9999
    # 80 x 80 x 30 voxels of 4 x 4 x 5 mm; the body spans 69 x 57 of them.
    assert {side: run["windows"] for side, run in runs.items()} == {OURS: 2, PLAIN: 2, ZOO: 4}


@needs_openvino
def test_openvino_reads_what_was_converted_once_and_gives_the_same_labels(job, caplog):
    assert convert_once(job) > 0
    with caplog.at_level(logging.INFO):
        run, ours = prepare(OPENVINO, job)(), prepare(OURS, job)()
    assert "; read in" in caplog.text and run["windows"] == ours["windows"] == 2
    assert (run["labels"] == ours["labels"]).mean() >= 0.999
    assert min(dice_of_classes(run["labels"], ours["labels"])) > 0.95  # of random weights


def test_weights_of_a_training_decide_the_network(job, tmp_path):
    torch.manual_seed(1)
    encoder = job.encoder | {"feature_size": 24}
    network = build_swin_unetr(encoder, out_channels=3)
    labels = {"0": "background", "1": "liver", "2": "spleen"}
    save_atomically({"model": network.state_dict(), "encoder": encoder, "labels": labels}, tmp_path / "model.pt")
    trained = replace(job, encoder=read_record(str(tmp_path / "model.pt")), weights=str(tmp_path / "model.pt"))
    for side in (OURS, ZOO):
        made = make_network(side, trained)
        assert made.out.conv.conv.out_channels == 3
        assert all(torch.equal(network.state_dict()[name], value) for name, value in made.state_dict().items())


def test_dice_of_two_label_maps_by_class():
    labels, others = np.array([0, 1, 1, 2, 2, 0], np.uint8), np.array([0, 1, 2, 2, 2, 3], np.uint8)
    assert dice_of_classes(labels, others) == pytest.approx([2 / 3, 4 / 5, 0])
    assert dice_of_classes(np.zeros(4, np.uint8), np.zeros(4, np.uint8)) == [1.0]


def test_a_second_run_gives_the_same(job):
    run = prepare(ZOO, job)
    first, second = run(), run()
    assert first["windows"] == second["windows"] and np.array_equal(first["labels"], second["labels"])


def test_command_prints_what_each_side_did_and_writes_it(here, tmp_path, capsys):
    size = [str(voxels) for voxels in SIZE]
    assert main(["--size", *size, "--model", "cpu", "--runs", "2", "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "cpu, CT of 60 x 60 x 32, overlap 0.5, 14 classes; ratios to zoo" in shown
    assert "convolution 2 GFLOP/s" in shown and "GFLOP" in shown and "time of each part" in shown
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["agreement"][OURS] == 1 and results["agreement"][PLAIN] >= 0.9999
    assert results["conversion"] is None and results["dice"][PLAIN]["lowest"] > 0.99
    assert "voxels with the same label as ours: plain 100.0000%; Dice of the classes 1.0000, the lowest" in shown
    assert results["precision"] == "float32" and results["size"] == list(SIZE) and results["machine"]["cores"] >= 1
    sides = results["comparison"]["sides"]
    assert list(sides) == list(DEFAULT_SIDES) and sides[ZOO]["windows"] == 4 and sides[OURS]["ratio"] == 1
    for side in sides.values():
        assert side["limit"] == pytest.approx(side["windows"] * side["window"]["flops"] / 2e9)


def test_a_scan_of_ones_own_is_taken(here, tmp_path, capsys):
    nib.save(nib.Nifti1Image(np.full((40, 40, 20), 50, np.int16), np.diag([-5, -5, 5, 1])), tmp_path / "mine.nii.gz")
    assert main(["--scan", str(tmp_path / "mine.nii.gz"), "--sides", "ours", "--runs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "CT of 40 x 40 x 20" in shown and "ratios to ours" in shown and "voxels with the same label" not in shown


def test_work_of_a_window_is_the_same_arithmetic_on_both_networks(job):
    fast, stock = window_work(OURS, job), window_work(ZOO, job)
    assert fast.flops == pytest.approx(stock.flops, rel=0.01) and min(fast.bytes, stock.bytes) > 4 * 64 * 64 * 32


def test_tiny_has_the_windows_of_base():
    numbers = []
    for model in ("base", "small", "tiny"):
        values = model_values(model)
        grid = [round(extent / spacing) for extent, spacing in zip(FIELD_OF_VIEW, values["spacing"], strict=True)]
        windows = window_places(
            [max(pair) for pair in zip(grid, values["roi_size"], strict=True)], roi_size=values["roi_size"], overlap=0.5
        )
        numbers.append(len(windows))
    assert numbers == [50, 50, 50]
    assert model_values("base")["roi_size"] == (96, 96, 96) and model_values("base")["encoder"]["feature_size"] == 48


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "8", "64", "64"], "--size [8, 64, 64]"),
        (["--runs", "0"], "--runs 0: must be 1 or more"),
        (["--overlap", "1"], "--overlap 1.0"),
        (["--scan", "nowhere.nii.gz"], "--scan nowhere.nii.gz is not a file"),
        (["--weights", "nowhere.pt"], "--weights nowhere.pt is not a file"),
    ],
)
def test_unusable_options_are_named(options, words, capsys):
    assert main(options) == 1
    assert words in capsys.readouterr().err
