# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Two processes with one scan each have the loss and the gradients of one process with both scans, for every task."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from bundles.pretraining.network import SwinPretrainer
from bundles.pretraining.proxy_tasks.augmented_views import AugmentedViews
from bundles.pretraining.proxy_tasks.losses import ProxyTaskLoss
from bundles.pretraining.proxy_tasks.tasks import TASKS

ROI = (64, 32, 32)
# tasks, reconstruction head, options of the loss
SETUPS = {
    "paper": (TASKS[:3], "vae", {}),
    "masked voxels only": (["inpainting"], "vae", {"masked_only": True}),
    "whole network": (TASKS, "unet", {"masked_only": True}),
    "position": (["position"], "unet", {}),
}


def batch_of(scans):
    """Two crops of each scan; the second scan has far less body and so fewer voxels that count."""
    crops, affines, draws = [], [], []
    for scan in scans:
        random = torch.Generator().manual_seed(scan)
        image = torch.rand(2, 1, *ROI, generator=random)
        if scan:
            image[:, :, 10:] = 0
        affine = torch.diag(torch.tensor([4.0, 4.0, 5.0, 1.0], dtype=torch.float64)).repeat(2, 1, 1)
        affine[:, :3, 3] = 50 * torch.randn(2, 3, generator=random)
        crops.append(image)
        affines.append(affine)
        draws += [scan, scan]
    return {"image": torch.cat(crops), "affine": torch.cat(affines), "draw": torch.tensor(draws)}


def one_step(record, setup, scans, *, distributed=False):
    """Return the loss and the gradients."""
    tasks, head, options = SETUPS[setup]
    torch.manual_seed(0)
    network = SwinPretrainer(
        encoder=record, tasks=tasks, heads={"reconstruction_head": head, "pooling": "mean"}, fast=True
    )
    model = torch.nn.parallel.DistributedDataParallel(network) if distributed else network
    views = AugmentedViews(
        seed=3,
        tasks=tasks,
        plane="official",
        mask_fill=["noise"],
        mask_ratio=[0.1, 0.5],
        mask_block=[0.1, 0.25],
        mask_rule="covered",
        intensity_change=0.1,
        body_above=0.25,
    )
    inputs, targets = views(batch_of(scans), "cpu")
    loss = ProxyTaskLoss(tasks=tasks, **options)(model.train()(inputs), targets)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def rank_process(rank, record, file, queue):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {setup: one_step(record, setup, [rank], distributed=True) for setup in SETUPS}
    queue.put(
        (rank, {setup: (loss, {k: g.numpy() for k, g in grads.items()}) for setup, (loss, grads) in results.items()})
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    record = {"in_channels": 1, "feature_size": 12, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    record |= {"window_size": 4, "patch_size": 2, "merging": "monai", "use_v2": False}
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    file = tmp_path_factory.mktemp("rendezvous") / "file"
    processes = [context.Process(target=rank_process, args=(rank, record, file, queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    return record, results


@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_equal_one(two_processes, setup):
    record, results = two_processes
    loss, gradients = one_step(record, setup, [0, 1])
    assert (results[0][setup][0] + results[1][setup][0]) / 2 == pytest.approx(loss, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for rank in (0, 1):
        theirs = results[rank][setup][1]
        assert set(theirs) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                torch.from_numpy(theirs[name]), gradient, rtol=2e-3, atol=1e-3 * largest, msg=f"{name} of rank {rank}"
            )


def test_the_two_scans_would_differ_if_each_process_divided_by_its_own_voxels(two_processes):
    """The test above could not pass by chance: the means of the two scans are far apart."""
    record, _ = two_processes
    for setup in ("masked voxels only", "position"):
        loss, _ = one_step(record, setup, [0, 1])
        apart = [one_step(record, setup, [scan])[0] for scan in (0, 1)]
        assert abs(sum(apart) / 2 - loss) > 1e-3 * loss
