# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Alone, everything is rank 0 of 1; two real processes see each other and share a validation set."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from monai.metrics import DiceMetric

from bundles.common.errors import InputError
from bundles.common.run import distributed


def test_a_single_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start(False)
    assert not distributed.is_distributed()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    network = torch.nn.Linear(2, 1)
    assert distributed.wrap(network, "cpu", False) is network
    assert distributed.unwrap(network) is network
    assert distributed.validation_sampler([1, 2, 3], False) is None
    assert distributed.gather_lists([1, 2]) == [1, 2]
    assert torch.equal(distributed.gather(torch.ones(2)), torch.ones(1, 2))
    distributed.stop()


@pytest.mark.parametrize(("device", "chosen"), [("cuda", 1), ("cuda:0", 0), (torch.device("cuda", 2), 2)])
def test_a_gpu_without_a_number_is_the_current_one(monkeypatch, device, chosen):
    """``--device cuda``: PyTorch's own set_device takes only a device with a number."""
    current, moved = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    network = torch.nn.Linear(2, 1)
    monkeypatch.setattr(network, "to", lambda device: moved.append(device) or network)
    assert distributed.wrap(network, device, False) is network
    assert current == [chosen] and moved == [torch.device("cuda", chosen)]


def test_several_processes_without_the_overlay_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="torchrun started 4 processes.*configs/multi_gpu_train.yaml"):
        distributed.start(False)


def test_the_overlay_without_torchrun_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun --standalone --nproc_per_node=2"):
        distributed.start(True)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "end_with_parent", lambda: None)
    with pytest.raises(
        InputError, match=r"at least 2 processes on this machine, which shows 1 GPU.*--nproc_per_node=1"
    ):
        distributed.start(True)


def test_a_launcher_that_is_gone_is_told_at_once(monkeypatch):
    """Joining the group would try to reach it for half an hour."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setattr(distributed, "end_with_parent", lambda: None)
        distributed._check_launcher()  # it is there
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"torchrun, which started this process, does not answer at 127.0.0.1:{port}"):
        distributed.start(True)
    assert time.monotonic() - began < 5 and not distributed.is_distributed()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do this")
def test_a_process_ends_with_the_launcher_that_is_killed(tmp_path):
    child = "from bundles.common.run.distributed import end_with_parent; import os, pathlib, time; end_with_parent(); pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(120)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    launcher = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    note = tmp_path / "pid"
    while not (note.exists() and note.read_text()):
        assert launcher.poll() is None
        time.sleep(0.05)
    process = int(note.read_text())
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
            raise AssertionError("the process outlived its launcher")
        time.sleep(0.05)


def mean_over_ranks(rank):
    """MONAI's mean over validation cases whose values are 0, 1, 2, 3 and 10."""
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    metric = DiceMetric(reduction="mean")
    for index in distributed.validation_sampler(values, True):
        metric.extend(values[index].reshape(1, 1))
    return float(metric.aggregate())


def two_processes(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    network = torch.nn.Linear(2, 1)
    wrapped = distributed.wrap(network, "cpu", True)
    normed = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    assert not wrapped.broadcast_buffers and distributed.wrap(normed, "cpu", True).broadcast_buffers
    loss = wrapped(torch.full((1, 2), float(rank + 1))).sum()
    loss.backward()
    # a gradient whose memory is transposed, as that of a matrix product may be
    own = torch.arange(6.0).reshape(2, 3).add(10 * rank).requires_grad_()
    gathered = distributed.gather(own)
    weight = torch.arange(12.0).reshape(2, 3, 2).transpose(1, 2)
    ((rank + 1) * weight * gathered).sum().backward()
    seen = {
        "gather_lists": distributed.gather_lists([rank, "x"]),
        "gathered": gathered.detach(),
        "gathered_gradient": own.grad,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "bare": distributed.unwrap(wrapped) is network,
        "weight": network.weight.detach(),
        "gradient": network.weight.grad,
        "share": list(distributed.validation_sampler(list(range(5)), True)),
        "share of one": list(distributed.validation_sampler([7], True)),
        "mean": mean_over_ranks(rank),
    }
    torch.save(seen, f"{folder}/{rank}.pt")
    distributed.stop()
    assert not distributed.is_distributed()


def test_two_processes_agree_on_weights_and_gradients_gather_tensors_and_share_the_validation_set(tmp_path):
    multiprocessing.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [(seen["rank"], seen["world_size"], seen["bare"]) for seen in (first, second)] == [
        (0, 2, True),
        (1, 2, True),
    ]
    assert torch.equal(first["weight"], second["weight"])
    # inputs 1 and 2, so gradients 1 and 2, of which DDP takes the mean
    for seen in (first, second):
        torch.testing.assert_close(seen["gradient"], torch.full((1, 2), 1.5))
    for rank, seen in enumerate((first, second)):
        assert seen["gather_lists"] == [0, "x", 1, "x"]
        ramp = torch.arange(6.0).reshape(2, 3)
        assert torch.equal(seen["gathered"], torch.stack([ramp, ramp + 10]))
        # the weight of this rank's place, times 1 of the first loss and 2 of the second
        assert torch.equal(seen["gathered_gradient"], 3 * torch.arange(12.0).reshape(2, 3, 2).transpose(1, 2)[rank])
    assert (first["share"], second["share"]) == ([0, 2, 4], [1, 3])  # no case twice
    assert first["share of one"] == second["share of one"] == [0]
    assert first["mean"] == second["mean"] == pytest.approx(3.2)
