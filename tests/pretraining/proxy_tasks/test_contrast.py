# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""NT-Xent equals a slow loop and MONAI's loss on one process, and the joined batch on two."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from monai.losses import ContrastiveLoss

from bundles.pretraining.proxy_tasks.contrast import NTXentLoss

BATCH, FEATURES, WIDTH = 3, 5, 7


def slow_loss(first, second, temperature):
    """For each embedding, minus the log of its partner's share among all the others (equation 2 of the paper)."""
    everyone = [row.tolist() for row in first] + [row.tolist() for row in second]
    number = len(first)

    def similarity(one, other):
        return math.exp(
            sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other) / temperature
        )

    losses = []
    for i, one in enumerate(everyone):
        partner = similarity(one, everyone[(i + number) % (2 * number)])
        others = sum(similarity(one, other) for k, other in enumerate(everyone) if k != i)
        losses.append(-math.log(partner / others))
    return sum(losses) / len(losses)


def views(batch, features=FEATURES, seed=0):
    return torch.randn(2, batch, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("batch", range(1, 9))
def test_the_loss_equals_a_slow_loop(batch, temperature):
    first, second = views(batch)
    expected = slow_loss(first, second, temperature)
    assert NTXentLoss(temperature)(first, second).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_temperature_is_that_of_the_released_code_unless_told():
    first, second = views(4)
    assert NTXentLoss()(first, second).item() == pytest.approx(slow_loss(first, second, 0.5), rel=1e-5)


@pytest.mark.parametrize("batch", range(1, 9))
def test_the_loss_and_its_gradient_equal_monai_on_one_process(batch):
    ours, theirs = views(batch).requires_grad_(), views(batch).requires_grad_()
    one, other = NTXentLoss(0.5)(*ours), ContrastiveLoss(temperature=0.5)(*theirs)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    one.backward()
    other.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_hand_made_case():
    # partners are equal, the other two are at right angles: -log(e^2 / (e^2 + 1 + 1))
    first = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert NTXentLoss(0.5)(first, 2 * first).item() == pytest.approx(expected, rel=1e-6)


def test_views_may_be_exchanged_and_scaled():
    first, second = views(4)
    loss = NTXentLoss()
    torch.testing.assert_close(loss(first, second), loss(second, first))
    torch.testing.assert_close(loss(first, second), loss(3 * first, 0.1 * second))


def test_logits_point_at_the_partner_and_never_at_the_embedding_itself():
    first, _ = views(4)
    similarity, partner = NTXentLoss().logits(first, first)
    assert partner.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert similarity.argmax(1).tolist() == partner.tolist()
    assert torch.isinf(similarity.diagonal()).all() and torch.isfinite(similarity).sum() == 8 * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_do_not_overflow(dtype):
    first, second = (300 * views(4, features=512)).to(dtype)
    assert torch.isinf((first * first).sum(1)).all() or dtype == torch.bfloat16  # their squares would
    loss = NTXentLoss(0.01)(first, second)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(first.double(), second.double(), 0.01), rel=1e-3)


def test_autocast_does_not_lower_the_precision():
    first, second = views(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(NTXentLoss(0.1)(first, second), NTXentLoss(0.1)(first.clone(), second.clone()))
        loss = NTXentLoss(0.1)(first, second)
    assert torch.equal(loss, NTXentLoss(0.1)(first, second))


def inputs(ranks):
    """Two views of every crop of every rank: (2, ranks x BATCH, FEATURES)."""
    return views(ranks * BATCH, seed=3)


def head():
    torch.manual_seed(5)
    return torch.nn.Linear(FEATURES, WIDTH)


def one_rank(rank, folder, ranks):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    network = head()
    own = inputs(ranks)[:, rank * BATCH : (rank + 1) * BATCH]
    loss = NTXentLoss(0.5)(*network(own))
    loss.backward()
    with torch.no_grad():
        similarity, partner = NTXentLoss(0.5).logits(*network(own))
        alone = NTXentLoss(0.5, across_ranks=False)(*network(own))
    gradient = {name: value.grad for name, value in network.named_parameters()}
    torch.save(
        {"alone": alone, "loss": loss.detach(), "gradient": gradient, "logits": similarity, "partner": partner},
        f"{folder}/{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_joined_batch_in_value_and_gradient(tmp_path):
    multiprocessing.spawn(one_rank, args=(str(tmp_path), 2), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    network = head()
    joined = NTXentLoss(0.5)(*network(inputs(2)))
    joined.backward()
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, joined.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ranks[0]["loss"], ranks[1]["loss"])
    for name, parameter in network.named_parameters():
        mean = (ranks[0]["gradient"][name] + ranks[1]["gradient"][name]) / 2  # what DDP leaves in every rank
        torch.testing.assert_close(mean, parameter.grad, rtol=1e-4, atol=1e-6)
    # rows: own first views, own second views; columns: all first views, all second views
    full, _ = NTXentLoss(0.5).logits(*network(inputs(2)))
    for rank, seen in enumerate(ranks):
        own = [*range(rank * BATCH, (rank + 1) * BATCH)]
        rows = own + [row + 2 * BATCH for row in own]
        torch.testing.assert_close(seen["logits"], full[rows].detach(), rtol=1e-5, atol=1e-6)
        assert seen["partner"].tolist() == rows[BATCH:] + rows[:BATCH]
        # on request the other ranks are left alone, as in validation
        first_crop = rank * BATCH
        own_views = inputs(2)[:, first_crop : first_crop + BATCH]
        torch.testing.assert_close(seen["alone"], NTXentLoss(0.5)(*network(own_views)).detach(), rtol=1e-5, atol=1e-6)
