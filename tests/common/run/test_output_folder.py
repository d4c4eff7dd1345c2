# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""An output folder belongs to one run, which finds out before it reads anything whether it can write there."""

from __future__ import annotations

import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.run import output_folder
from bundles.common.run.output_folder import check_room, claim_output

from ...forked_python import ROOT, ForkedPython

HOLDS = """
import multiprocessing, sys, time
from bundles.common.run.output_folder import claim_output
claim_output(sys.argv[1], use=sys.argv[2])
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()  # as a loading process
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_claims(monkeypatch):
    monkeypatch.setattr(output_folder, "_claims", {})


@pytest.fixture
def other(tmp_path):
    """Another run that trains into a folder, with a child; yields its process and the child."""
    process = ForkedPython(
        ["-c", HOLDS, tmp_path / "out", "training"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    while not process.output.endswith("\n"):
        assert process.poll() is None, process.errors
    child = int(process.output)
    yield process, child
    process.kill()
    os.kill(child, signal.SIGKILL)


def test_a_folder_that_another_run_writes_into_is_refused_until_it_is_killed(tmp_path, other):
    process, child = other
    with pytest.raises(
        InputError, match=f"Another training writes into --output_dir .*out .process {process.pid} on .* since 20"
    ):
        claim_output(tmp_path / "out", use="training")
    claim_output(tmp_path / "out", use="evaluation")  # reads what the training wrote
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    os.kill(child, 0)  # lives on, as the loading processes of a killed run do for some seconds
    claim_output(tmp_path / "out", use="training")


def test_a_process_may_claim_its_folder_again(tmp_path):
    for _ in range(2):
        claim_output(tmp_path / "new" / "out", use="training")
    assert (tmp_path / "new" / "out").is_dir()


def test_only_rank_0_claims(tmp_path, other, monkeypatch):
    monkeypatch.setattr(output_folder, "rank", lambda: 1)
    claim_output(tmp_path / "out", use="training")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write into --output_dir .*file/out: Not a directory"):
        claim_output(tmp_path / "file" / "out", use="inference")
    with pytest.raises(InputError, match="Cannot write into --output_dir .*file: File exists"):
        claim_output(tmp_path / "file", use="inference")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        claim_output(tmp_path / "out", use="inference")


def test_without_locks_a_warning_tells_to_take_care(tmp_path, monkeypatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "lockf", no_locks)
    claim_output(tmp_path, use="training")
    (message,) = caplog.messages
    assert "cannot be locked (No locks available): start no other training into it" in message


@pytest.mark.parametrize(("averaged", "copies"), [(False, 10), (True, 12)])
def test_room_for_the_checkpoints_is_asked_for_first(tmp_path, monkeypatch, averaged, copies):
    network = torch.nn.Linear(1000, 250, bias=False)  # a million bytes
    disk = namedtuple("disk", "total used free")
    free = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(0, 0, free["now"]))
    free["now"] = copies * 1_000_000
    check_room(tmp_path, network, averaged=averaged)
    free["now"] -= 1
    with pytest.raises(InputError, match="GB free, but the checkpoints of this network need") as error:
        check_room(tmp_path, network, averaged=averaged)
    assert f"{copies / 1000:.2g} GB" in str(error.value)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "last.pt").write_bytes(b"1")  # is replaced
    check_room(tmp_path, network, averaged=averaged)


def test_a_last_pt_has_the_size_that_is_reckoned_with(tmp_path):
    network = torch.nn.Linear(1000, 250, bias=False)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").stat().st_size == pytest.approx(3_000_000, rel=0.01)
