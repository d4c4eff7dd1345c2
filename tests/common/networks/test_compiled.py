# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Compiled regions compute the same, keep their names, and are all compiled; what cannot be compiled is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bundles.common.errors import InputError
from bundles.common.networks import compiled as module
from bundles.common.networks.compiled import check_compile, compiled
from bundles.common.networks.fast import unet_blocks
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.common.run.options import RULES
from bundles.pretraining.network import SwinPretrainer

RECORD = {"in_channels": 1, "feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
RECORD |= {"patch_size": 2, "merging": "monai", "use_v2": False}
BLOCKS = 11  # of the decoder


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_swin_unetr(RECORD, out_channels=4)


def outcome(model, x):
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return out, [p.grad.clone() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "regions"), [("decoder", BLOCKS), ("network", BLOCKS + 5)])
def test_values_gradients_and_names_stay(choice, regions):
    plain, model = network(), network()
    names = list(model.state_dict())
    assert compiled(model, compile=choice, device="cpu", backend="aot_eager") is model
    assert list(model.state_dict()) == names
    assert sum(each._compiled_call_impl is not None for each in model.modules()) == regions
    x = torch.randn(1, 1, 64, 64, 32)
    (out, grads), (expected, true) = outcome(model, x), outcome(plain, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for grad, other in zip(grads, true, strict=True):
        assert (grad - other).norm() <= 1e-4 * other.norm() + 1e-9
    assert copy.deepcopy(model).decoder1._compiled_call_impl is None  # the average of the weights is not compiled


@pytest.mark.slow
def test_every_block_is_compiled_in_training_and_in_validation(monkeypatch):
    """PyTorch's limit of 8 versions would leave three of the blocks uncompiled, and all of them in a validation."""
    monkeypatch.setattr(unet_blocks, "can_fuse", lambda *_: False)  # as on a GPU: no graph breaks in a block
    counter = CompileCounterWithBackend("eager")
    model = compiled(network(), compile="decoder", device="cpu", backend=counter)
    x = torch.randn(1, 1, 64, 64, 32)
    model(x).mean().backward()
    assert counter.frame_count == BLOCKS
    model(x)
    assert counter.frame_count == BLOCKS
    with torch.no_grad():
        model.eval()(x)
    assert counter.frame_count == 2 * BLOCKS
    shapes = [node.meta["example_value"].shape for graph in counter.graphs for node in graph.graph.nodes
              if node.op == "placeholder"]  # fmt: skip
    assert all(isinstance(size, int) for shape in shapes for size in shape)  # none is compiled for changing shapes


@pytest.mark.slow
def test_the_default_compiler_gives_the_same():
    block = network().encoder1
    model = torch.nn.Sequential(copy.deepcopy(block))
    compiled(model, compile="decoder", device="cpu")
    x = torch.randn(1, 1, 8, 8, 8)
    (out, grads), (expected, true) = outcome(model, x), outcome(block, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for grad, other in zip(grads, true, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("head", "tasks", "regions"),
    [("vae", ["inpainting"], 1), ("unet", ["inpainting"], BLOCKS), ("vae", ["inpainting", "position"], BLOCKS + 1)],
)
def test_a_pre_trainings_heads_are_part_of_its_decoder(head, tasks, regions):
    model = SwinPretrainer(encoder=RECORD, tasks=tasks, heads={"reconstruction_head": head, "pooling": "mean"})
    compiled(model, compile="decoder", device="cpu")
    assert sum(each._compiled_call_impl is not None for each in model.modules()) == regions
    assert model.conv._compiled_call_impl is not None


def test_off_means_off():
    model = compiled(network(), compile=None, device="cpu")
    assert all(each._compiled_call_impl is None for each in model.modules())
    assert torch._dynamo.config.recompile_limit == 8


def test_what_cannot_be_compiled_here_is_refused_with_what_is_missing(monkeypatch):
    with pytest.raises(
        InputError, match="--compile graphs needs a GPU, and this run is on cpu: .* Use --compile network"
    ):
        check_compile(compile="graphs", device="cpu")
    with pytest.raises(InputError, match="--compile graphs cannot sum the gradients of 4 batches"):
        check_compile(compile="graphs", device="cuda", accumulation_steps=4)
    with pytest.raises(InputError, match="--compile 'all' is not one of decoder, network, graphs"):
        check_compile(compile="all", device="cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/opt/c++" if name == "mine" else None)
    with pytest.raises(
        InputError, match=r"has no C\+\+ compiler \(g\+\+ or clang\+\+\); install one, name one in CXX, or"
    ):
        check_compile(compile="decoder", device="cpu")
    monkeypatch.setenv("CXX", "mine")
    check_compile(compile="decoder", device="cpu")
    check_compile(compile=None, device="cpu")


def test_on_a_gpu_triton_its_age_and_a_c_compiler_count(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(InputError, match="Triton is missing"):
        check_compile(compile="graphs", device="cuda")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="older than what Triton compiles for"):
        check_compile(compile="graphs", device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(InputError, match=r"has no C compiler \(gcc or clang\)"):
        check_compile(compile="graphs", device="cuda")
    monkeypatch.setattr(module.shutil, "which", lambda name: name == "gcc")
    check_compile(compile="graphs", device="cuda")


def test_graphs_tell_pytorch_where_a_step_begins(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(module, "check_compile", lambda **_: None)
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: modes.append(options))
    model = compiled(network(), compile="graphs", device="cuda")
    assert modes == [{"dynamic": False, "mode": "reduce-overhead"}] * (BLOCKS + 5)
    for _ in range(2):
        model(torch.randn(1, 1, 64, 64, 32))
    assert begun == [1, 1]


def test_the_option_is_checked_like_the_function():
    for choice in (None, *module.REGIONS):
        RULES["compile"].check("compile", choice)
    with pytest.raises(InputError, match="--compile 'off' is not one of decoder, network, graphs"):
        RULES["compile"].check("compile", "off")


def test_every_way_into_a_pre_training_begins_a_generation_of_graphs(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    heads = {"reconstruction_head": "unet", "pooling": "mean"}
    model = SwinPretrainer(encoder=RECORD, tasks=["inpainting", "position"], heads=heads).eval()
    crop = torch.rand(1, 1, 64, 32, 32)
    ways = (model.features, model.predict_positions, lambda x: model.proxy_outputs(torch.cat([x] * 3)))
    with torch.no_grad():
        for way in ways:
            way(crop)
        assert not begun
        model.graphs_are_replayed = True
        for number, way in enumerate(ways, 1):
            way(crop)
            assert len(begun) == number
