# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write checkpoint files atomically, and read them without running code that they contain."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ..errors import InputError
from ..files import atomic_path, file_stamp
from .claimed_sizes import check_tensor_sizes, check_unpacked_size
from .plain_facts import check_plain_facts

GIT_LFS_POINTER = b"version https://git-lfs"
HTML_STARTS = (b"<!doctype html", b"<html", b"<?xml")


class _NumberKind:
    """Replacement for ``numpy.dtype`` during unpickling. It accepts only number types, and restores only byte order."""

    def __init__(self, kind: str, *_: object) -> None:
        if kind not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({kind!r}) is not a number type")
        self.kind, self.order = kind, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]
        if self.order not in ("<", ">", "|", "=") or any(part not in (None, -1, 0) for part in state[2:]):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype with a state that number types do not have")


def _number(kind: _NumberKind, data: bytes) -> float | int | bool:
    """Replacement for NumPy's scalar constructor during unpickling."""
    return np.frombuffer(data, dtype=np.dtype(kind.order.replace("|", "=") + kind.kind), count=1)[0].item()


# NumPy numbers, such as the best score that many training scripts save with the weights. They are read without NumPy's
# own unpickling.
NUMPY_NUMBERS = [
    (_NumberKind, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def save_atomically(obj: object, path: str | os.PathLike) -> None:
    """Write ``obj`` with `torch.save` so that ``path`` is always a complete checkpoint: the old one or the new one.

    The data is on disk (fsync) before the file gets its name. Parent folders are created. The file's permissions follow
    the umask.

    Args:
        obj: what to save: only tensors, numbers, text and containers of these, so that `load_checkpoint_file` can read
            it.
        path: the checkpoint file.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint_file(path: str | os.PathLike, map_location: str | torch.device = "cpu"):
    """Read a file of `torch.save` with ``weights_only=True``, so that an untrusted file cannot run code.

    Args:
        path: the checkpoint file, or a ``.safetensors`` file.
        map_location: device for the tensors.

    Returns:
        The saved object.

    Raises:
        InputError: the file is missing, empty, truncated, a git-LFS pointer, a web page, not written by `torch.save`,
            contains Python objects other than tensors and plain containers, or claims more memory than its size allows.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"The checkpoint file {path} does not exist: check the path, or create or download the file.")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"The checkpoint file {path} cannot be read: {error.strerror}.") from error

    if not head:
        raise InputError(f"The checkpoint file {path} is empty (0 bytes): create it or download it again.")
    if head.startswith(GIT_LFS_POINTER):
        raise InputError(f"{path} is a git-LFS pointer, not the checkpoint itself: fetch the file with 'git lfs pull'.")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(HTML_STARTS):
        raise InputError(
            f"{path} is a web page, not a checkpoint: the download returned an error or log-in page. "
            "Open the URL in a browser to see it, and download the file again."
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(map_location))
        check_unpacked_size(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            content = torch.load(path, map_location=map_location, weights_only=True)
        if torch.device(map_location).type != "meta":  # there, nothing takes memory
            check_tensor_sizes(content, path)
        return content
    except (torch.OutOfMemoryError, InputError):
        raise
    except (MemoryError, RecursionError) as error:
        raise InputError(
            f"{path} was refused: it asks for more memory than there is, or is nested too deeply. Create it or download it "
            "again; if it was so from the start, do not trust it."
        ) from error
    # What torch raises for a broken file depends on the place of the damage: RuntimeError from the zip reader, OSError
    # from the memory map, EOFError, or KeyError and UnpicklingError, because it reads any other bytes as an old pickle.
    except (
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        RuntimeError,
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
    ) as error:
        raise InputError(_why_unreadable(path, error, is_zip=head.startswith(b"PK"))) from error


def _why_unreadable(path: Path, error: Exception, *, is_zip: bool) -> str:
    message = str(error)
    if "TorchScript" in message:
        return (
            f"{path} is a TorchScript program, not a checkpoint of weights, and was not run. "
            "Pass the checkpoint (.pt) that it was exported from."
        )
    # A zip archive that torch could open, or an old pickle that contains a class or function.
    if isinstance(error, pickle.UnpicklingError) and (is_zip or "GLOBAL" in message):
        name = re.search(r"GLOBAL (\S+)", message)
        content = f"'{name[1]}'" if name else "a Python object"
        return (
            f"{path} was refused: it contains {content}. Only tensors, numbers, text and containers of these are read "
            "(weights_only=True), because anything else in a checkpoint can run code. If you trust its author, ask for "
            "a file that contains only the state dict, or write one."
        )
    first_line = message.strip().partition("\n")[0]
    detail = f" ({type(error).__name__}: {first_line})" if is_zip and first_line else ""
    return (
        f"{path} cannot be read as a checkpoint{detail}: it is truncated, damaged, or not a file that torch.save wrote "
        f"({path.stat().st_size} bytes). Create it or download it again, and compare its size or checksum."
    )


#: Contents of opened files by path, each with the file's stamp; the last one is the most recently used.
_opened: OrderedDict[str, tuple[list[int], Any]] = OrderedDict()
_facts: OrderedDict[str, tuple[list[int], dict[str, Any]]] = OrderedDict()
MAX_OPENED, MAX_FACTS = 8, 64


def open_checkpoint(path: str | os.PathLike) -> Any:
    """Read a file of weights once per run, like `load_checkpoint_file`; the content is kept until `release_checkpoint`.

    The content is shared: do not change it. A file that changed (size or modification time) is read again.

    Raises:
        InputError: see `load_checkpoint_file` and `check_plain_facts`.
    """
    key = os.path.abspath(path)
    stamp = file_stamp(path) if os.path.exists(path) else []
    known, content = _opened.get(key, (None, None))
    if known != stamp:
        content = load_checkpoint_file(path)
        check_plain_facts(content, str(path))
        _keep(_opened, key, (stamp, content), MAX_OPENED)
        _keep(_facts, key, (stamp, _without_tensors(content)), MAX_FACTS)
    _opened.move_to_end(key)
    return content


def checkpoint_facts(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a checkpoint records besides tensors: its top-level entries, a state dict as the list of its names.

    Raises:
        InputError: see `load_checkpoint_file`.
    """
    key = os.path.abspath(path)
    if key not in _facts or not os.path.exists(path) or _facts[key][0] != file_stamp(path):
        release_checkpoint(path)
        open_checkpoint(path)
    return _facts[key][1]


def release_checkpoint(path: str | os.PathLike) -> None:
    """Free the tensors of an opened file; `checkpoint_facts` still knows the rest."""
    _opened.pop(os.path.abspath(path), None)


def _keep(cache: OrderedDict, key: str, value: Any, size: int) -> None:
    cache[key] = value
    while len(cache) > size:
        cache.popitem(last=False)


def _without_tensors(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {}
    return {
        name: list(value) if isinstance(value, Mapping) and any(map(torch.is_tensor, value.values())) else value
        for name, value in content.items()
        if not torch.is_tensor(value)
    }
