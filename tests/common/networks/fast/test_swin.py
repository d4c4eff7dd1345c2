# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Whole networks on the fast path: MONAI's names, results, gradients and training, with less kept for the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from bundles.common.networks.fast.swin import FAST, FastSwinTransformer, make_fast
from bundles.common.networks.swin_unetr import build_encoder, build_swin_unetr
from bundles.pretraining.network import SwinPretrainer

from .test_attention import assert_same_gradients

CROP = (64, 32, 32)  # bottleneck 2 x 1 x 1


def pair(build, record, *, dtype=torch.float64, **options):
    """The stock network and the fast one with the same weights, none of them at its neutral value."""
    stock, fast = build(record, fast=False, **options), build(record, fast=True, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    fast.load_state_dict(stock.state_dict(), strict=True)
    return stock.to(dtype), fast.to(dtype)


def image(*shape, dtype=torch.float64, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def segmenter(record, **options):
    return build_swin_unetr(record, out_channels=3, **options)


def pretrainer(record, *, head="vae", **options):
    heads = {"reconstruction_head": head, "pooling": "token"}
    return SwinPretrainer(encoder=record, tasks=["rotation", "contrast", "inpainting"], heads=heads, **options)


def outputs_of(result):
    if isinstance(result, dict):
        return list(result.values())
    return [result] if torch.is_tensor(result) else list(result)


def loss_of(result):
    """Different weights on every element, so that a wrong place would show."""
    return sum(
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outputs_of(result)
    )


def assert_equal_training(stock, fast, x):
    expected, out = stock(x), fast(x)
    for theirs, ours in zip(outputs_of(expected), outputs_of(out), strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-10
    loss_of(expected).backward()
    loss_of(out).backward()
    assert_same_gradients(stock, fast)


VARIANTS = {
    "plain": {},
    "depths 2": {"depths": [2, 2, 1, 1]},
    "legacy merging": {"merging": "legacy"},
    "use_v2": {"use_v2": True},
    "3 channels": {"in_channels": 3},
    "window 3": {"window_size": 3, "depths": [2, 1, 1, 2]},
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_the_encoder(record, change):
    record = record | change
    stock, fast = pair(build_encoder, record)
    assert_equal_training(stock, fast, image(2, record["in_channels"], *CROP))


def test_the_encoder_without_the_norm_of_its_outputs(record):
    stock, fast = pair(build_encoder, record)
    x = image(1, 1, *CROP)
    with torch.no_grad():
        for theirs, ours in zip(stock(x, normalize=False), fast(x, normalize=False), strict=True):
            assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("change", [{"in_channels": 2, "depths": [2, 1, 1, 1]}, {"use_v2": True, "in_channels": 4}])
def test_swin_unetr(record, change):
    record = record | change
    stock, fast = pair(segmenter, record)
    assert_equal_training(stock, fast, image(1, record["in_channels"], *CROP))


@pytest.mark.parametrize("head", ["vae", "deconv"])
def test_the_pre_training_network(record, head):
    stock, fast = pair(pretrainer, record, head=head)
    assert_equal_training(stock.train(), fast.train(), image(2, 1, *CROP))
    with torch.no_grad():
        x = image(1, 1, *CROP, seed=2)
        assert (fast.eval()(x) - stock.eval()(x)).abs().max() < 1e-10


def test_rois_that_need_padding_and_have_no_two_sides_alike(record):
    stock, fast = pair(build_encoder, record | {"window_size": 5, "depths": [2, 1, 1, 1]})
    assert_equal_training(stock, fast, image(1, 1, 32, 64, 96))


def test_gradient_checkpointing(record):
    stock, fast = pair(build_encoder, record | {"depths": [2, 1, 1, 1]}, use_checkpoint=True)
    assert_equal_training(stock, fast, image(1, 1, *CROP))
    stock.zero_grad()
    fast.zero_grad()
    x = image(1, 1, *CROP).requires_grad_()
    loss_of(stock(x)).backward()
    layer = fast.layers1[0]  # the older, reentrant way, around what is already checkpointed
    layer.forward = lambda t: checkpoint(type(layer).forward, layer, t, use_reentrant=True)
    loss_of(fast(x)).backward()
    assert_same_gradients(stock, fast)


def test_a_frozen_encoder_in_a_network_that_trains(record):
    stock, fast = pair(segmenter, record, freeze_encoder=True)
    assert_equal_training(stock, fast, image(1, 1, *CROP))
    assert all(p.grad is None for p in fast.swinViT.parameters())


def test_stochastic_depth_draws_the_same(record):
    stock, fast = pair(segmenter, record | {"depths": [2, 1, 1, 1]}, drop_path=0.5)
    outs = []
    for network in (stock, fast):
        torch.manual_seed(3)
        outs.append(network.train()(image(2, 1, *CROP)))
    assert (outs[0] - outs[1]).abs().max() < 1e-10


def test_the_deepest_output_alone(record):
    fast = build_encoder(record | {"use_v2": True}).eval()
    x = image(1, 1, *CROP, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(fast.deepest(x), fast(x)[4])
        assert torch.equal(fast.deepest(x, normalize=False), fast(x, False)[4])


@pytest.mark.parametrize("build", [segmenter, pretrainer, lambda record, **options: build_encoder(record, **options)])
def test_state_dicts_go_both_ways(record, build):
    record = record | {"use_v2": True}
    stock, fast = build(record, fast=False), build(record, fast=True)
    assert list(stock.state_dict()) == list(fast.state_dict())
    assert [n for n, _ in stock.named_parameters()] == [n for n, _ in fast.named_parameters()]
    stock.load_state_dict(fast.state_dict(), strict=True)
    fast.load_state_dict(stock.state_dict(), strict=True)


def test_the_same_seed_draws_the_same_first_weights(record):
    states = []
    for fast in (False, True):
        torch.manual_seed(0)
        states.append(segmenter(record, fast=fast).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_module_of_monai_is_replaced_and_stays_what_it_was(record):
    network = segmenter(record)
    left = [name for name, module in network.named_modules() if type(module) in FAST]
    assert left == []
    assert isinstance(network.swinViT, FastSwinTransformer)
    for kind, quick in FAST.items():
        assert issubclass(quick, kind)
    assert make_fast(network) is network


def test_loss_curves_overlap(record):
    labels = (image(1, 1, *CROP, seed=5) * 3).long()
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    curves = []
    for network in pair(segmenter, record | {"depths": [2, 1, 1, 1]}, dtype=torch.float32):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        curve = []
        for step in range(20):
            optimizer.zero_grad()
            loss = loss_function(network(image(1, 1, *CROP, dtype=torch.float32, seed=step % 4)), labels)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][0] - curves[0][-1] > 0.05, "it learns"
    for theirs, ours in zip(*curves, strict=True):
        assert abs(ours - theirs) < 2e-3


def test_a_crop_with_one_voxel_at_the_bottom_is_refused_as_monai_refuses_it(record):
    for network in pair(segmenter, record):
        with pytest.raises(ValueError, match="Expected more than 1 spatial element when training"):
            network.eval()(image(1, 1, 32, 32, 32))


def kept_bytes(network, x):
    """Bytes that a forward leaves for the backward, each piece of memory once, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(x)
    return sum(size for size, _ in kept.values())


def test_at_most_seven_tenths_are_kept_for_the_backward(record):
    """Ratios of the base size: windows of 7, feature size to heads 16 to 1."""
    base = {"feature_size": 48, "num_heads": [3, 6, 12, 24], "depths": [2, 2, 1, 1], "window_size": 7}
    x = image(1, 1, 64, 64, 32, dtype=torch.float32)
    stock, fast = pair(segmenter, record | base, dtype=torch.float32)
    assert kept_bytes(fast, x) < 0.7 * kept_bytes(stock, x)
    stock, fast = pair(pretrainer, record | base, dtype=torch.float32)
    assert kept_bytes(fast, x) < 0.5 * kept_bytes(stock, x)


def test_a_metatensor_comes_out_as_one_with_its_affine(record):
    network = segmenter(record).eval()
    x = MetaTensor(image(1, 1, *CROP, dtype=torch.float32), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])))
    with torch.no_grad():
        out, plain = network(x), network(x.as_tensor())
    assert isinstance(out, MetaTensor) and torch.equal(out.affine, x.affine)
    assert type(plain) is torch.Tensor and torch.equal(out.as_tensor(), plain)


@pytest.mark.parametrize("build", [segmenter, pretrainer])
def test_a_trace_is_right_on_another_batch_size_and_holds_no_python(record, build, tmp_path):
    fast = build(record | {"depths": [2, 1, 1, 1]}).double().eval()
    with torch.no_grad():
        torch.jit.trace(fast, image(1, 1, *CROP), check_trace=False).save(tmp_path / "model.ts")
        loaded = torch.jit.load(tmp_path / "model.ts")
        x = image(3, 1, *CROP, seed=4)
        assert (loaded(x) - fast(x)).abs().max() < 1e-10


def test_export_to_onnx(record, tmp_path):
    pytest.importorskip("onnx")
    network = segmenter(record).eval()
    x = image(1, 1, *CROP, dtype=torch.float32)
    torch.onnx.export(network, (x,), tmp_path / "model.onnx", dynamo=False)
    assert (tmp_path / "model.onnx").stat().st_size > 2**20


def test_torch_export_gives_the_same_values(record):
    network = build_encoder(record).eval()
    x = image(1, 1, *CROP, dtype=torch.float32)
    with torch.no_grad():
        exported = torch.export.export(network, (x,)).module()
        for theirs, ours in zip(network(x), exported(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_distributed_data_parallel_sees_every_gradient(record, tmp_path):
    stock, fast = pair(segmenter, record)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(fast)
        x = image(1, 1, *CROP)
        for _ in range(2):  # the second forward fails if the first left a gradient out
            stock.zero_grad()
            parallel.zero_grad()
            loss_of(stock(x)).backward()
            loss_of(parallel(x)).backward()
        assert_same_gradients(stock, fast)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_network_trains_alike(record):
    """On a CPU the graph breaks at the attention and at the norms; values and gradients are the same."""
    stock, fast = pair(segmenter, record)
    compiled = torch.compile(copy.deepcopy(fast), backend="aot_eager")
    x = image(1, 1, *CROP)
    expected, out = stock(x), compiled(x)
    assert (out - expected).abs().max() < 1e-10
    loss_of(expected).backward()
    loss_of(out).backward()
    assert_same_gradients(stock, compiled._orig_mod)
