# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pooled features lose what all views of a step share, over all processes in training."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from bundles.pretraining.network import SwinPretrainer
from bundles.pretraining.proxy_tasks.contrast import NTXentLoss
from bundles.pretraining.proxy_tasks.pooled_norm import PooledNorm

CHANNELS, VIEWS = 6, 4


def features(ranks=1):
    return 3.0 + 0.1 * torch.randn(ranks * VIEWS, CHANNELS, generator=torch.Generator().manual_seed(1))


def test_it_is_batch_norm_over_the_views_without_anything_to_remember():
    x, theirs = features(), torch.nn.BatchNorm1d(CHANNELS, affine=False)
    torch.testing.assert_close(PooledNorm()(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(PooledNorm().eval()(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert not PooledNorm().state_dict() and PooledNorm()(x + 100).mean(dim=0).abs().max() < 1e-3


def test_half_precision_is_normalised_in_float32():
    x = (1000 + features()).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PooledNorm()(x).dtype == torch.float32


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = features(2)[rank * VIEWS : (rank + 1) * VIEWS].requires_grad_()
    norm = PooledNorm()
    result = norm(own)
    NTXentLoss()(*result.chunk(2)).backward()
    alone = norm.eval()(own).detach()
    torch.save({"result": result.detach(), "gradient": own.grad / 2, "alone": alone}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_in_values_and_gradients(tmp_path):
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole, norm = features(2).requires_grad_(), PooledNorm()
    result = norm(whole)
    # the loss of the joined batch: first views of both ranks, then second views
    halves = result.reshape(2, 2, VIEWS // 2, CHANNELS).transpose(0, 1).reshape(2, VIEWS, CHANNELS)
    NTXentLoss()(*halves).backward()
    torch.testing.assert_close(torch.cat([each["result"] for each in ranks]), result.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([each["gradient"] for each in ranks]), whole.grad, rtol=1e-4, atol=1e-5)
    for rank, each in enumerate(ranks):  # in validation, the other ranks are left alone
        own = features(2)[rank * VIEWS : (rank + 1) * VIEWS]
        torch.testing.assert_close(each["alone"], PooledNorm()(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "normalised_mean"])
def test_heads_see_in_what_crops_differ(record, pooling):
    """At the start, the mean over the bottleneck is nearly the same vector for all crops."""
    torch.manual_seed(0)
    heads = {"reconstruction_head": "vae", "pooling": pooling}
    network = SwinPretrainer(encoder=record, tasks=["contrast", "rotation"], heads=heads).train()
    x = torch.rand(4, 1, 32, 32, 32, generator=torch.Generator().manual_seed(2))
    embeddings = torch.nn.functional.normalize(network(x)["contrast"].detach(), dim=1)
    likeness = (embeddings @ embeddings.T)[~torch.eye(4, dtype=bool)].mean()
    assert likeness > 0.9 if pooling == "mean" else likeness < 0.2
