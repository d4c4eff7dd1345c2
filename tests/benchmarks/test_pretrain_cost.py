# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The costs computed on fake tensors equal those of real tensors and of formulas written out by hand."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import WindowAttention
from torch import nn
from torch.nn import functional as F

from benchmarks.pretrain_cost import (
    GIB,
    LiveBytes,
    Mode,
    SavedBytes,
    StepCost,
    _autocast_as_on_gpu,
    _batch,
    _print_markdown,
    _row,
    main,
    step_cost,
)
from bundles.common.networks.swin_unetr import build_swin_unetr
from bundles.pretraining.network import EMBEDDING, OFFICIAL_HEADS, SwinPretrainer
from bundles.pretraining.proxy_tasks.losses import ProxyTaskLoss
from bundles.pretraining.proxy_tasks.tasks import PAPER_TASKS as TASKS

CROP = (64, 64, 32)


def cost_of(record, *, crops=1, **mode):
    return step_cost(encoder=record, roi_size=CROP, crops=crops, mode=Mode(**mode))


def real_step(record, *, checkpointing=False):
    """Bytes kept and peak bytes of a step on the CPU, without weights."""
    network = SwinPretrainer(encoder=record, tasks=TASKS, use_checkpoint=checkpointing, fast=False)
    weights = [*network.parameters(), *network.buffers()]
    saved = SavedBytes(weights)
    with LiveBytes(weights) as live:
        views, targets = _batch(record, CROP, 1, "cpu")
        with saved:
            outputs = network(views)
            loss = ProxyTaskLoss(tasks=TASKS)(outputs, targets)
        kept = saved.now()
        loss.backward()
    return kept, live.peak


def test_saved_bytes_are_the_input_and_the_activation_of_a_linear_layer():
    layer, x = nn.Linear(8, 16), torch.rand(4, 8)
    saved = SavedBytes(layer.parameters())
    with saved:
        result = layer(x).relu()
        layer(torch.rand(100, 8)).relu()  # its graph is freed at once
    assert saved.now() == 4 * (4 * 8 + 4 * 16)
    result.sum().backward()
    assert saved.now() == 0


def test_live_bytes_are_those_of_storages_in_use():
    weight = torch.ones(1000)
    with LiveBytes([weight]) as live:
        a = weight * 2  # 4000 bytes
        b = a.double()  # 8000 bytes
        views = [a.view(10, 100).t(), weight[:10]]
        assert (live.now, live.peak) == (12000, 12000)
        del b
        c = a + 1
        a = None
        assert (live.now, live.peak) == (8000, 12000)  # a view still holds the storage of a
        del views, c
        assert (live.now, live.peak) == (0, 12000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_on_fake_tensors_is_that_of_a_real_step(record, checkpointing):
    cost = cost_of(record, checkpointing=checkpointing)
    kept, peak = real_step(record, checkpointing=checkpointing)
    assert cost.kept == pytest.approx(kept, rel=0.01)
    assert cost.peak == pytest.approx(peak + 12 * cost.parameters, rel=0.01)


def test_parameters_and_fixed_memory_are_those_of_the_real_network(record):
    network = SwinPretrainer(encoder=record, tasks=TASKS, fast=False)
    weights, gradients_and_moments = sum(p.numel() for p in network.parameters()), 3
    encoder = sum(p.numel() for p in network.swinViT.parameters())
    cost = cost_of(record)
    assert (cost.encoder_parameters, cost.head_parameters) == (encoder, weights - encoder)
    assert cost.fixed == 4 * weights * (1 + gradients_and_moments)


def test_the_decoder_counts_where_the_inpainting_goes_through_it(record, capsys):
    whole = step_cost(
        encoder=record, roi_size=CROP, crops=1, mode=Mode(), heads={**OFFICIAL_HEADS, "reconstruction_head": "unet"}
    )
    network = build_swin_unetr(record, out_channels=1, fast=False)
    decoder = sum(p.numel() for p in network.parameters()) - whole.encoder_parameters
    features = 16 * record["feature_size"]
    assert whole.head_parameters == decoder + 4 * (features + 1) + EMBEDDING * (
        features + 1
    )  # and the two linear heads
    assert whole.forward_flops > 2 * cost_of(record).forward_flops
    assert (
        main(["--preset", "whole_network", "--crops", "1", "--roi_size", *map(str, CROP), "--feature_size", "12"]) == 0
    )
    title = " ".join(capsys.readouterr().out.split())
    assert "reconstruction head unet; without the task position" in title


def test_forward_flops_are_those_of_the_layers_written_out(record):
    counted = []

    def convolution(layer, inputs, output):
        counted.append(2 * output.numel() * layer.in_channels * layer.kernel_size[0] ** 3)

    def linear(layer, inputs, output):
        counted.append(2 * output.numel() * layer.in_features)

    def attention(layer, inputs, output):
        windows, tokens, channels = output.shape
        counted.append(2 * 2 * windows * tokens * tokens * channels)  # scores, and their product with the values

    network = SwinPretrainer(encoder=record, tasks=TASKS, fast=False)
    for kind, count in ((nn.Conv3d, convolution), (nn.Linear, linear), (WindowAttention, attention)):
        for layer in network.modules():
            if isinstance(layer, kind):
                layer.register_forward_hook(count)
    network(_batch(record, CROP, 1, "cpu")[0])
    similarities = 2 * 2 * 2 * EMBEDDING  # of two views with each other
    assert cost_of(record).forward_flops == sum(counted) + similarities


def test_checkpointing_keeps_less_and_computes_more(record):
    plain, checkpointed = cost_of(record), cost_of(record, checkpointing=True)
    assert checkpointed.kept < 0.5 * plain.kept
    assert checkpointed.peak < plain.peak
    assert checkpointed.forward_flops == plain.forward_flops
    assert plain.backward_flops < checkpointed.backward_flops < plain.backward_flops + plain.forward_flops


def test_twice_the_crops_keep_twice_the_bytes(record):
    one, two = cost_of(record), cost_of(record, crops=2)
    assert two.kept == pytest.approx(2 * one.kept, rel=0.02)
    assert two.fixed == one.fixed


def test_half_precision_casts_as_on_a_gpu(record):
    layer_norm = F.layer_norm
    x = torch.rand(1, 4, 2, 2, 2, dtype=torch.bfloat16)
    with _autocast_as_on_gpu(True) as autocast:
        with autocast():
            assert F.conv3d(x.float(), torch.rand(4, 4, 1, 1, 1)).dtype == torch.bfloat16
            assert F.layer_norm(x, [2]).dtype == torch.float32
            assert nn.Upsample(scale_factor=2, mode="trilinear")(x).dtype == torch.float32
        assert F.layer_norm(x, [2]).dtype == torch.bfloat16
    assert F.layer_norm is layer_norm
    # If a PyTorch upgrade changes what it registers for autocast, this fails.
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for operation in ("aten::layer_norm", "aten::upsample_trilinear3d"):
        assert registered(operation, "AutocastCUDA") and not registered(operation, "AutocastCPU")


def test_half_precision_halves_what_no_layer_needs_in_float32(record):
    full, half = (cost_of(record, half=half, checkpointing=True) for half in (False, True))
    assert 0.5 * full.kept < half.kept < 0.75 * full.kept  # inputs of blocks and the head's activations
    assert half.fixed == full.fixed


def test_row_states_its_numbers_in_the_units_of_its_headings():
    cost = StepCost(
        encoder_parameters=8_100_000,
        head_parameters=11_000_000,
        forward_flops=10**12,
        backward_flops=2 * 10**12,
        kept=3 * GIB,
        peak=5 * GIB,
    )
    row = _row(48, Mode(half=True, checkpointing=True), cost, 50.0)
    assert {heading.replace("\n", " "): cell.replace("\n", " ") for heading, cell in row.items()} == {
        "size": "48",
        "mode": "bf16 + checkpointing",
        "million parameters": "8.1 + 11.0 = 19.1",
        "forward TFLOP": "1",
        "backward TFLOP": "2",
        "step TFLOP": "3",
        "fixed GiB": "0.28",  # 16 x 19.1e6 / 2^30
        "kept GiB": "3.00",
        "peak GiB": "5.00",
        "ms at 50 TFLOP/s": "60",
    }


def test_command_prints_a_row_per_mode(capsys):
    arguments = ["--preset", "cpu", "--crops", "1", "--depths", "1", "1", "1", "1", "--num_heads", "3", "3", "3", "3"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "1 crop of 64 x 64 x 32" in table and "heads 3/3/3/3" in " ".join(table.split())
    assert table.count("fp32") == table.count("bf16") == 2


def test_markdown_table_has_a_line_per_row(capsys):
    _print_markdown(
        "Title", [{"size": "48", "mode": "fp32", "kept\nGiB": "1"}, {"size": "24", "mode": "bf\n16", "kept\nGiB": "2"}]
    )
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "",
        "| size | mode | kept GiB |",
        "| --- | --- | ---: |",
        "| 48 | fp32 | 1 |",
        "| 24 | bf 16 | 2 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--measure"], ["--measure", "GPU", "finds none"]),
        (["--crops", "0"], ["--crops 0"]),
        (["--teraflops", "-1"], ["--teraflops -1"]),
        (["--preset", "large"], ["large", "official, paper, whole_network, cpu"]),
        (["--feature_size", "20"], ["feature_size 20"]),
        (["--roi_size", "40", "40", "40"], ["[40, 40, 40]", "divisible by 32"]),
    ],
)
def test_bad_input_ends_with_one_message(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("Stopped: ") and all(word in message for word in words)
