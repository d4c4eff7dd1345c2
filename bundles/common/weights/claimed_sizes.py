# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse a checkpoint that would take far more memory than its file has bytes, before anything of it is copied."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

UNPACKED = 10  # times the size of the file; torch.save does not compress, and weights barely compress
EXPANDED = 2**24  # bytes of a tensor that may repeat its storage, such as a buffer made by expand()
NO_TRUST = "torch.save of a real training does not write that; do not trust the file"


def check_unpacked_size(path: Path) -> None:
    """Check that the entries of a file of `torch.save` unpack to little more than the file.

    Raises:
        InputError: they claim more than `UNPACKED` times its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch says what is wrong
    size = os.path.getsize(path)
    if claimed > UNPACKED * size + EXPANDED:
        raise InputError(
            f"{path} was refused: its {size} bytes would unpack to {claimed}. {NO_TRUST[0].upper()}{NO_TRUST[1:]}."
        )


def check_tensor_sizes(content: Any, path: Path) -> None:
    """Check that every tensor of an opened file has its numbers in the file.

    Raises:
        InputError: a tensor has far more numbers than its storage (a stride of 0), no storage (on the device meta), or a
            sparse layout, which can claim any shape.
    """
    todo, seen = [("", content)], set()
    while todo:  # not recursive: a hostile file may be nested deeper than Python's stack
        name, value = todo.pop()
        if isinstance(value, torch.Tensor):
            _check_tensor(value, name, path)
            continue
        if not isinstance(value, (Mapping, list, tuple, set)) or id(value) in seen:
            continue
        seen.add(id(value))
        inner = value.items() if isinstance(value, Mapping) else enumerate(value)
        todo += [(f"{name}::{key}"[-80:].lstrip(":"), each) for key, each in inner]


def _check_tensor(tensor: torch.Tensor, name: str, path: Path) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the device meta" if tensor.is_meta else f"of layout {tensor.layout}"
        raise InputError(
            f"{path} was refused: its tensor {name} {tuple(tensor.shape)} is {kind}; weights are plain tensors."
        )
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored and claimed > EXPANDED:
        raise InputError(
            f"{path} was refused: its tensor {name} claims {tensor.numel()} numbers, {claimed} bytes, and the file holds "
            f"{stored}; {NO_TRUST}."
        )
