# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse a checkpoint that would take far more memory than its file has bytes, before any of it is copied."""

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
MAX_DEPTH = 100
NO_TRUST = "No training writes that; do not trust the file"


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
        raise InputError(f"{path} was refused: its {size} bytes would unpack to {claimed}. {NO_TRUST}.")


def check_tensor_sizes(content: Any, path: Path) -> None:
    """Check that every tensor of an opened file has its numbers in the file.

    Raises:
        InputError: tensors have far more numbers than their storage (a stride of 0), one has no storage (on the device
            meta) or a sparse layout, which can claim any shape; or the content is nested too deeply.
    """
    todo, seen, repeated = [("", content, 0)], set(), 0
    while todo:  # not recursive: a hostile file may be nested deeper than Python's stack
        name, value, depth = todo.pop()
        if isinstance(value, torch.Tensor):
            repeated += _repeated_bytes(value, name, path)
            if repeated > EXPANDED:
                raise InputError(
                    f"{path} was refused: its tensor {name} {tuple(value.shape)} claims {value.numel()} numbers, and the file "
                    f"holds {value.untyped_storage().nbytes()} bytes of it. {NO_TRUST}."
                )
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            if depth > MAX_DEPTH:
                raise InputError(f"{path} was refused: it is nested more than {MAX_DEPTH} levels deep. {NO_TRUST}.")
            seen.add(id(value))
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            todo += [(f"{name}::{key}"[-80:].lstrip(":"), each, depth + 1) for key, each in inner]


def _repeated_bytes(tensor: torch.Tensor, name: str, path: Path) -> int:
    """Return how many bytes a tensor claims beyond those of its storage."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the device meta" if tensor.is_meta else f"of layout {tensor.layout}"
        raise InputError(
            f"{path} was refused: its tensor {name} {tuple(tensor.shape)} is {kind}; weights are plain tensors."
        )
    return max(0, tensor.numel() * tensor.element_size() - tensor.untyped_storage().nbytes())
