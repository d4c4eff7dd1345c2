# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Files written whole or not at all, and one writer at a time."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a hidden temporary path in the folder of ``path``; on success it becomes ``path``, on failure it goes.

    The temporary name ends in the final name, so that a writer which goes by the suffix (``.nii.gz``, ``.png``) does
    the same to both. Parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, lines ended as they are given, whole or not at all: on the disk (fsync) before it gets its name."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Keep other processes out for moments, by a lock on a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
