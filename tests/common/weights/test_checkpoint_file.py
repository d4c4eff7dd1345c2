# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Checkpoint files are whole or absent, and reading one never runs code."""

from __future__ import annotations

import gc
import os
import pickle
import stat
import weakref

import numpy as np
import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.files import atomic_path
from bundles.common.weights.checkpoint_file import (
    MAX_OPENED,
    checkpoint_facts,
    load_checkpoint_file,
    open_checkpoint,
    release_checkpoint,
    save_atomically,
)


class Payload:
    """Unpickling this makes a file: the trace that code of a checkpoint was run."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


class FailsWhenSaved:
    def __reduce__(self):
        raise RuntimeError("the disk is on fire")


def message_of(path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_read_back_and_parent_folders_are_made(tmp_path):
    path = tmp_path / "run" / "models" / "encoder.pt"
    save_atomically({"state_dict": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 7, "names": ["a", None]}, path)
    loaded = load_checkpoint_file(path)
    assert loaded["step"] == 7 and loaded["names"] == ["a", None]
    assert torch.equal(loaded["state_dict"]["w"], torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    assert os.listdir(path.parent) == ["encoder.pt"]


def test_map_location_is_followed(tmp_path):
    save_atomically({"w": torch.zeros(2)}, tmp_path / "a.pt")
    assert load_checkpoint_file(tmp_path / "a.pt", map_location="meta")["w"].device.type == "meta"


def test_a_failed_save_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = tmp_path / "last.pt"
    save_atomically({"step": 1}, path)
    with pytest.raises(RuntimeError, match="on fire"):
        save_atomically({"w": torch.zeros(1000), "step": FailsWhenSaved()}, path)
    assert load_checkpoint_file(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_file_has_its_final_name_only_when_it_is_whole(tmp_path):
    with atomic_path(tmp_path / "mask.nii.gz") as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path and temporary.name.startswith(".") and temporary.name.endswith(".nii.gz")
        assert not (tmp_path / "mask.nii.gz").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["mask.nii.gz"]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        save_atomically({"a": 1}, tmp_path / "a.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == expected


def test_missing_file_is_named(tmp_path):
    assert "does not exist" in message_of(tmp_path / "none.pt")


def test_a_folder_is_refused(tmp_path):
    assert "directory" in message_of(tmp_path)


def test_empty_file_is_named(tmp_path):
    (tmp_path / "empty.pt").touch()
    assert "empty (0 bytes)" in message_of(tmp_path / "empty.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.999])
def test_truncated_file_is_named_with_its_size(tmp_path, kept, zipped):
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.randn(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    message = message_of(path)
    assert "truncated" in message and f"{int(len(whole) * kept)} bytes" in message


@pytest.mark.parametrize("content", [b"hello, I am text", bytes(range(256)) * 20, b"\x1f\x8b\x08\x00gz", b"\x93NUMPY"])
def test_other_bytes_are_not_a_checkpoint(tmp_path, content):
    (tmp_path / "notes.pt").write_bytes(content)
    assert "not a file that torch.save wrote" in message_of(tmp_path / "notes.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    trace = tmp_path / "trace"
    path = tmp_path / "evil.pt"
    torch.save({"w": torch.zeros(2), "x": Payload(str(trace))}, path, _use_new_zipfile_serialization=zipped)
    message = message_of(path)
    assert "refused" in message and "weights_only" in message and "mkdir" in message
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_plain_pickle_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload(str(trace))))
    message_of(tmp_path / "evil.pt")
    assert not trace.exists()


def test_a_whole_pickled_network_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pt")
    message = message_of(tmp_path / "net.pt")
    assert "torch.nn.modules.linear.Linear" in message and "state dict" in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TorchScript archive.*:UserWarning")
def test_torchscript_is_told_from_a_checkpoint(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "net.ts"))
    assert "TorchScript" in message_of(tmp_path / "net.ts")


def test_git_lfs_pointer_is_recognised(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 256\n"
    (tmp_path / "model.pt").write_text(pointer)
    message = message_of(tmp_path / "model.pt")
    assert "git-LFS pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>", "\n  <html lang='en'>", "<?xml version='1.0'?><Error>"])
def test_web_page_is_recognised(tmp_path, page):
    (tmp_path / "model.pt").write_text(page)
    message = message_of(tmp_path / "model.pt")
    assert "web page" in message and "download" in message


def test_numbers_of_numpy_come_back_as_numbers(tmp_path):
    numbers = {"f": np.float64(0.1), "h": np.float32(0.5), "i": np.int64(-7), "b": np.bool_(True), "u": np.uint8(200)}
    torch.save(numbers, tmp_path / "n.pt")
    assert load_checkpoint_file(tmp_path / "n.pt") == numbers
    torch.save(numbers, tmp_path / "n.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint_file(tmp_path / "n.pt") == numbers


@pytest.mark.parametrize("forged", [np.dtype("O"), np.dtype("i4,i4"), np.array([1.0]), np.datetime64("2020-01-01")])
def test_other_things_of_numpy_are_refused(tmp_path, forged):
    torch.save({"x": forged}, tmp_path / "n.pt")
    with pytest.raises(InputError, match="n.pt was refused: it contains"):
        load_checkpoint_file(tmp_path / "n.pt")


class ForgedKind:
    """Pickles as a float64's dtype with flags that only kinds with objects have."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


def test_a_forged_kind_of_number_is_refused(tmp_path):
    torch.save({"x": ForgedKind()}, tmp_path / "n.pt")
    with pytest.raises(InputError, match="n.pt was refused"):
        load_checkpoint_file(tmp_path / "n.pt")


@pytest.fixture
def opened(monkeypatch):
    """Paths that torch.load is called with."""
    calls = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, *args, **options: calls.append(path) or load(path, *args, **options)
    )
    return calls


def test_a_file_is_opened_once_until_it_changes(tmp_path, opened):
    path = tmp_path / "model.pt"
    save_atomically({"model": {"weight": torch.ones(2)}, "labels": {"0": "background"}}, path)
    assert torch.equal(open_checkpoint(path)["model"]["weight"], torch.ones(2))
    assert open_checkpoint(str(path)) is open_checkpoint(path)
    assert checkpoint_facts(path) == {"model": ["weight"], "labels": {"0": "background"}}
    assert len(opened) == 1
    save_atomically({"model": {"weight": torch.zeros(3)}}, path)
    assert checkpoint_facts(path) == {"model": ["weight"]}
    assert torch.equal(open_checkpoint(path)["model"]["weight"], torch.zeros(3))
    assert len(opened) == 2


def test_a_released_file_is_still_known_without_its_tensors(tmp_path, opened):
    path = tmp_path / "model.pt"
    save_atomically({"model": {"weight": torch.ones(2)}, "trained": {"steps": 3}}, path)
    content = weakref.ref(open_checkpoint(path)["model"]["weight"])
    release_checkpoint(path)
    gc.collect()
    assert content() is None  # the memory is free
    assert checkpoint_facts(path)["trained"] == {"steps": 3}
    assert len(opened) == 1


def test_a_file_that_is_gone_is_an_error_even_if_it_was_open(tmp_path):
    path = tmp_path / "model.pt"
    save_atomically({"model": {}}, path)
    open_checkpoint(path)
    path.unlink()
    for read in (open_checkpoint, checkpoint_facts):
        with pytest.raises(InputError, match="does not exist"):
            read(path)


def test_few_files_are_held_open(tmp_path, opened):
    paths = [tmp_path / f"{number}.pt" for number in range(MAX_OPENED + 1)]
    for path in paths:
        save_atomically({"model": {"weight": torch.ones(1)}}, path)
        open_checkpoint(path)
    open_checkpoint(paths[-1])
    assert len(opened) == len(paths)
    open_checkpoint(paths[0])
    assert len(opened) == len(paths) + 1
