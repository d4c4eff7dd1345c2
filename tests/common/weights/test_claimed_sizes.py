# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A checkpoint that claims more than its file holds is refused before memory is asked for it; real ones open."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.weights.checkpoint_file import load_checkpoint_file, open_checkpoint
from zoo.package.packed_weights import open_safely


def with_pickle(path: Path, data: bytes) -> None:
    """A file of torch.save with another pickle in it."""
    torch.save({}, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w") as archive:
        for name in plain.namelist():
            archive.writestr(name, data if name.endswith("data.pkl") else plain.read(name))


def deep(path: Path, key: bytes = b"trained") -> None:
    text = b"X" + len(key).to_bytes(4, "little") + key
    with_pickle(path, b"\x80\x02}" + text + b"]" * 5000 + b"a" * 4999 + b"s.")


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(40 * 2**20))


HOSTILE = {
    "stride of 0": (
        lambda path: torch.save({"state_dict": {"a.b": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}}, path),
        r"tensor state_dict::a.b \(1000000, 1000000\) claims 1000000000000 numbers, and the file holds 4 bytes",
    ),
    "many that repeat": (
        lambda path: torch.save([torch.zeros(1).as_strided((10**6,), (0,)) for _ in range(5)], path),
        "claims 1000000 numbers",
    ),
    "no storage": (lambda path: torch.save({"a": torch.empty(10**12, device="meta")}, path), "on the device meta"),
    "sparse": (
        lambda path: torch.save({"a": torch.sparse_coo_tensor([[0]], [1.0], (10**12,))}, path),
        "layout torch.sparse_coo",
    ),
    "nested deeply": (deep, "nested more than 100 levels deep"),
    "a terabyte of zeros": (
        lambda path: with_pickle(path, b"\x80\x02cbuiltins\nbytearray\n\x8a\x07\x00\x00\x00\x00\x00\x00\x10\x85R."),
        "asks for more memory than there is",
    ),
    "compressed a thousandfold": (deflated, r"its \d+ bytes would unpack to 41943040"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("read", [load_checkpoint_file, open_checkpoint, open_safely])
def test_files_that_claim_more_than_they_hold_are_refused(tmp_path, kind, read):
    make, words = HOSTILE[kind]
    make(tmp_path / "model.pt")
    with pytest.raises(InputError, match=rf"model\.pt was refused: .*{words}"):
        read(tmp_path / "model.pt")


def test_tied_views_and_expanded_buffers_of_real_models_open(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    content = {
        "a": weight,
        "tied": weight,
        "transposed": weight.T,
        "row": weight[1],
        "buffer": torch.ones(1).expand(99),
    }
    content["itself"] = inner = []
    inner.append(inner)
    torch.save(content, tmp_path / "model.pt")
    read = load_checkpoint_file(tmp_path / "model.pt")
    assert torch.equal(read["transposed"], weight.T) and read["buffer"].shape == (99,)
