# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Exported models give the outputs of the bundle's network, for both patch-merging orders.

The commands are those of docs/how-to/export.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest
import torch

from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.weights.checkpoint_file import save_atomically
from bundles.common.weights.loading import load_model
from zoo.pack import pack
from zoo.package.archive import extract_archive

from ..conftest import TINY_ENCODER
from ..forked_python import run
from ..zoo.conftest import ORGANS
from ..zoo.own_process import python

ROI = [64, 64, 32]
BATCHES = (1, 2, 3)
MERGINGS = ("legacy", "monai")
Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Exported:
    """A packed bundle with exported models, and its network with both patch-merging orders."""

    folder: Path
    own: Network
    other: Network


@pytest.fixture(scope="module", params=MERGINGS)
def exported(request, tmp_path_factory) -> Exported:
    """Export a bundle with random weights; the comparison does not need trained ones."""
    work = tmp_path_factory.mktemp(f"export_{request.param}")
    torch.manual_seed(0)
    state = build_swin_unetr(TINY_ENCODER, out_channels=14).state_dict()
    trained = {"preset": "cpu", "spacing": [4.0, 4.0, 5.0], "hu_window": [-175.0, 250.0], "roi_size": ROI}
    content = {
        "model": state,
        "encoder": TINY_ENCODER | {"merging": request.param},
        "labels": ORGANS,
        "trained": trained,
    }
    save_atomically(content, work / "models/model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.pack.run_checks", lambda folder, names: iter(()))
        package = pack("swin_unetr_btcv_seg", models=work / "models", out=work)
    folder = extract_archive(package.archive, work / "unpacked")
    shape = ["--input_shape", str([1, 1, *ROI])]
    torchscript = ["--config_file", "configs/inference.yaml", "--key_in_ckpt", "model", "--use_trace", "True"]
    python("-m", "monai.bundle", "ckpt_export", *torchscript, *shape, cwd=folder)
    python("-m", "monai.bundle", "onnx_export", "--args_file", "configs/export_onnx.yaml", *shape, cwd=folder)
    overlay = "['configs/inference.yaml','configs/export_pt2.yaml']"
    python("-m", "monai.bundle", "run", "--config_file", overlay, cwd=folder)
    networks = {}
    for merging in MERGINGS:
        networks[merging] = build_swin_unetr(TINY_ENCODER | {"merging": merging}, out_channels=14).eval()
        networks[merging].load_state_dict(state)
    load_model(networks[request.param], str(folder / "models/model.pt"))  # as the bundle loads it
    return Exported(folder, networks.pop(request.param), networks.popitem()[1])


def compare(exported: Exported, model: Network) -> None:
    """Assert equal outputs for several batch sizes, with the patch-merging order of the weights only."""
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        windows = torch.rand(batch, 1, *ROI, generator=generator)
        with torch.no_grad():
            expected, other, output = exported.own(windows), exported.other(windows), model(windows)
        assert output.shape == expected.shape == (batch, 14, *ROI)
        assert (output - expected).abs().max() < 1e-4
        assert (output - other).abs().max() > 1e-2


def test_the_exported_program_gives_the_logits_of_the_network(exported):
    compare(exported, torch.export.load(exported.folder / "models/model.pt2").module())


def test_torchscript_gives_the_logits_of_the_network(exported):
    compare(exported, torch.jit.load(exported.folder / "models/model.ts"))


def test_onnx_gives_the_logits_of_the_network_in_onnxruntime(exported):
    path = exported.folder / "models/model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [node.name for node in (*session.get_inputs(), *session.get_outputs())] == ["image", "pred"]

    def model(windows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["pred"], {"image": windows.numpy()})[0])

    compare(exported, model)


def test_weights_that_are_named_once_are_exported_right_or_refused(exported, tmp_path):
    """MONAI's usual command names the weights for the export alone; the network was built without them."""
    folder = Path(shutil.copytree(exported.folder, tmp_path / "bundle"))
    weights = tmp_path / "weights.pt"
    (folder / "models/model.pt").rename(weights)
    (folder / "models/model.ts").unlink()
    words = ["-m", "monai.bundle", "ckpt_export", "--config_file", "configs/inference.yaml", "--key_in_ckpt", "model"]
    words += ["--use_trace", "True", "--input_shape", str([1, 1, *ROI]), "--ckpt_file", str(weights)]
    failed = run(words, cwd=folder, env=os.environ, timeout=600)
    assert failed.returncode == 1 and not (folder / "models/model.ts").exists()
    assert "is given other weights" in failed.stderr and "--pretrained_model FILE" in failed.stderr.splitlines()[-1]
    python(*words, "--pretrained_model", str(weights), cwd=folder)
    compare(exported, torch.jit.load(folder / "models/model.ts"))


def test_torchscript_carries_metadata_and_config(exported):
    files = {"metadata.json": "", "inference.json": ""}
    torch.jit.load(exported.folder / "models/model.ts", _extra_files=files)
    assert json.loads(files["metadata.json"])["network_data_format"]["outputs"]["pred"]["num_channels"] == 14
    assert json.loads(files["inference.json"])["network_def"]["_target_"].endswith("build_swin_unetr")


TENSORRT = """
import json
from monai.bundle import ConfigParser

config = ConfigParser(ConfigParser.load_config_files(["configs/inference.yaml", "configs/inference_trt.yaml"]))
network = config.get_parsed_content("network")
arguments = config.get_parsed_content("trt")
print("found", json.dumps([type(network).__name__, config.get_parsed_content("engine"), config.get_parsed_content("amp"), arguments]))
"""


@pytest.mark.parametrize("exported", ["legacy"], indirect=True)
def test_the_overlay_for_tensorrt_is_well_formed(exported):
    """This is all that can be tested without a GPU, where MONAI leaves the network unchanged."""
    ended = python("-c", TENSORRT, cwd=exported.folder)
    output = ended.stdout + ended.stderr
    (found,) = [line for line in output.splitlines() if line.startswith("found ")]
    network, engine, amp, arguments = json.loads(found.removeprefix("found "))
    weights = hashlib.sha256((exported.folder / "models/model.pt").read_bytes()).hexdigest()
    assert (network, engine, amp) == ("FastSwinUNETR", f"./models/model.pt.{weights[:12]}.64x64x32", False)
    assert arguments["dynamic_batchsize"] == [1, 4, 4] and arguments["precision"] == "fp16"
    assert "timestamp" not in arguments  # every file of a package has the same date
    assert "trt_compile() has no effect" in output
