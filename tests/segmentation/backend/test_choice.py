# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""OpenVINO computes only what was seen to be PyTorch's; else PyTorch goes on, with a warning."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from importlib.util import find_spec

import pytest
import torch

from bundles.common.errors import InputError
from bundles.segmentation.backend import choice
from bundles.segmentation.backend.choice import (
    COMPARED,
    PRECISION,
    TOLERANCE,
    OpenVinoBackend,
    check_backend,
    choose_backend,
    precision_of_run,
)
from bundles.segmentation.backend.openvino_network import OpenVinoNetwork, convert, fast_types, version
from bundles.segmentation.inference.probability_inferer import ProbabilityInferer

from .conftest import ROI, build, needs_openvino, smooth_scan

SCAN = smooth_scan(96, 48, 32)


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "models").mkdir()
    return str(tmp_path / "models" / "model.pt")


@pytest.fixture
def conversions(monkeypatch) -> list:
    """Networks that were converted."""
    done = []

    def noted(network, **options):
        done.append(network)
        return convert(network, **options)

    monkeypatch.setattr(choice, "convert", noted)
    return done


def chosen(file: str) -> OpenVinoBackend:
    return choose_backend(backend="openvino", device="cpu", models=[file], roi_size=list(ROI))


def test_pytorch_needs_nothing_and_replaces_nothing(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose_backend(backend="torch", device="cuda", models=[file], roi_size=ROI) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "onnx", "device": "cpu"}, "--backend 'onnx' is not one of torch, openvino, openvino_bf16"),
        ({"backend": "openvino", "device": "cuda:0"}, "this run is on cuda:0. Add --device cpu"),
        ({"backend": "openvino", "device": "cpu"}, "needs the package openvino, .*pip install openvino"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_cure(monkeypatch, options, words):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=words):
        check_backend(**options)


@needs_openvino
def test_probabilities_are_pytorchs_and_the_second_run_reads_what_the_first_kept(file, conversions, caplog):
    arguments = {"roi_size": ROI, "sw_batch_size": 2, "overlap": 0.5}
    expected = ProbabilityInferer(**arguments)(SCAN, build())
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # as in two processes: the networks are other objects
            inferer = ProbabilityInferer(**arguments, backend=chosen(file))
            for _ in range(2):
                torch.testing.assert_close(inferer(SCAN, network := build()), expected, rtol=0, atol=1e-4)
    assert inferer.computed_by() == [f"OpenVINO {version()} in fp32"]
    assert len(conversions) == 1
    told = (
        r"model\.pt: OpenVINO 2\d+\.\S+ computes it in fp32 with \d+ threads?; .* from PyTorch's is \S+; converted in"
    )
    assert re.search(told, caplog.text)
    assert "kept for the next run" in caplog.text and "; read in" in caplog.text
    assert isinstance(chosen(file)(network, 0, SCAN), OpenVinoNetwork)


@needs_openvino
def test_members_of_an_ensemble_keep_their_own_conversions(tmp_path, conversions):
    files = [str(tmp_path / f"fold{number}" / "model.pt") for number in range(2)]
    networks = [build(seed) for seed in range(2)]
    arguments = {"roi_size": ROI, "sw_batch_size": 2, "overlap": 0.25}
    expected = ProbabilityInferer(**arguments, others=networks[1:])(SCAN, networks[0])
    backend = OpenVinoBackend(models=files, roi_size=ROI)
    result = ProbabilityInferer(**arguments, others=networks[1:], backend=backend)(SCAN, networks[0])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert conversions == networks
    assert len(list(tmp_path.glob("fold?/model.openvino_64x32x32.json"))) == 2


@needs_openvino
def test_weights_that_are_written_to_are_converted_anew(file, conversions):
    network, backend = build(), chosen(file)
    first = backend(network, 0, SCAN)
    assert backend(network, 0, SCAN) is first
    network.load_state_dict(build(seed=1).state_dict())  # as MONAI Label does after a training
    second = backend(network, 0, SCAN)
    window = SCAN[..., :64, :32, :]
    torch.testing.assert_close(second(window), network(window), rtol=0, atol=1e-3)
    assert len(conversions) == 2 and (second(window) - first(window)).abs().max() > 0.1


@needs_openvino
def test_a_network_that_differs_is_refused_with_the_figure(file, monkeypatch, caplog):
    monkeypatch.setattr(choice, "convert", lambda network, **options: convert(build(seed=1), **options))
    network = build()
    inferer = ProbabilityInferer(roi_size=ROI, sw_batch_size=1, overlap=0.0, backend=chosen(file))
    assert inferer.computed_by() == []
    inferer(SCAN, network)
    assert inferer.computed_by() == [f"PyTorch {torch.__version__}"]
    figure = float(re.search(r"from PyTorch's is (\S+) \(allowed: 1e-03\)\. PyTorch goes on", caplog.text)[1])
    assert TOLERANCE < figure <= 1
    assert not os.listdir(os.path.dirname(file))  # nothing is kept of it


@needs_openvino
def test_a_network_that_cannot_be_converted_is_told_and_pytorch_goes_on(file, caplog):
    class Odd(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("no such operation")

    network = Odd()
    assert chosen(file)(network, 0, SCAN) is network
    assert "OpenVINO" in caplog.text and "no such operation" in caplog.text and "PyTorch goes on" in caplog.text


@needs_openvino
def test_another_processor_is_compared_before_it_uses_a_kept_conversion(file, conversions, monkeypatch):
    chosen(file)(build(), 0, SCAN)
    monkeypatch.setattr(choice, "processor", lambda: "another")
    chosen(file)(build(), 0, SCAN)
    (record,) = [name for name in os.listdir(os.path.dirname(file)) if name.endswith(".json")]
    checked = json.loads(open(os.path.join(os.path.dirname(file), record)).read())["checked"]
    assert len(conversions) == 1 and len(checked) == 2 and 0 < checked["another, fp32"] <= TOLERANCE


def test_in_bf16_the_labels_are_compared_and_in_fp32_the_probabilities():
    logits = torch.zeros(1, 2, 10, 10, 10)
    logits[:, 1] = 1.0
    other = logits.clone()
    other[:, 1, 0, 0, :4] = -1.0  # another label in 4 of 1000 voxels
    window = torch.zeros(1)
    compared = {
        precision: choice._difference(lambda x: logits, lambda x: other, window, precision) for precision in COMPARED
    }
    assert compared == pytest.approx(
        {"bf16": 4 / 1000, "fp32": float(logits.softmax(1)[0, 1, 0, 0, 0]) - 0.26894}, abs=1e-5
    )
    other[..., 0] = torch.nan
    assert choice._difference(lambda x: logits, lambda x: other, window, "bf16") != pytest.approx(0.0)


@needs_openvino
def test_without_bfloat16_in_the_processor_it_is_refused(monkeypatch):
    monkeypatch.setattr(choice, "fast_types", lambda: ["FP32", "INT8"])
    check_backend(backend="openvino", device="cpu")
    with pytest.raises(InputError, match=r"does not compute in bfloat16\. Use --backend openvino\."):
        check_backend(backend="openvino_bf16", device="cpu")


@needs_openvino
@pytest.mark.skipif(find_spec("openvino") is not None and "BF16" not in fast_types(), reason="needs bfloat16")
def test_bf16_uses_the_same_conversion_with_a_check_of_its_own(file, conversions, monkeypatch):
    monkeypatch.setattr(choice, "TOLERANCE", 1.0)  # of random weights, half a percent of the labels differ
    network, window = build(), SCAN[..., :64, :32, :]
    results = {}
    for backend in ("openvino", "openvino_bf16"):
        used = choose_backend(backend=backend, device="cpu", models=[file], roi_size=list(ROI))(network, 0, SCAN)
        assert used.computed_by.endswith(f" in {PRECISION[backend]}")
        results[backend] = (used(window) - network(window)).abs().max()
    assert len(conversions) == 1 and results["openvino"] < 1e-3 < results["openvino_bf16"] < 0.5
    assert precision_of_run(backend="openvino_bf16", amp=False, amp_type="auto") == "bf16"
    assert precision_of_run(backend="torch", amp=False, amp_type="auto") == "fp32"


@needs_openvino
def test_a_folder_that_cannot_be_written_costs_a_conversion_in_each_run_only(file, conversions, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(choice.KeptConversion, "write", refuse)
    assert isinstance(chosen(file)(build(), 0, SCAN), OpenVinoNetwork)
    assert isinstance(chosen(file)(build(), 0, SCAN), OpenVinoNetwork)
    assert len(conversions) == 2
    assert "cannot be kept in" in caplog.text and "Permission denied" in caplog.text
