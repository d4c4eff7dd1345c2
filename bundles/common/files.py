# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Write and move files, lock folders, check whether a file has changed and whether a disk is full."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# errno of a place where no file can be written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def full_disk(error: BaseException | None) -> OSError | None:
    """Return the error of a full or read-only disk among an error and its causes, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a hidden temporary path next to ``path``. It is renamed to ``path`` on success and deleted on failure.

    The temporary name ends with the final name, so that writers that choose a format by suffix (``.nii.gz``,
    ``.png``) choose the right one. Parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        if (full := full_disk(error)) is not None:
            full.filename = str(path)  # an error of writing names no file, or the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically; line endings are kept. It is on disk (fsync) before it is renamed."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 100, **options: Any) -> None:
    """Write a figure atomically; the suffix of its file chooses the format.

    Args:
        figure: the figure.
        path: its file; parent folders are created.
        dpi: pixels per inch of the figure's size.
        options: further arguments of `Figure.savefig`.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, **options)


def move_file(path: str | os.PathLike, to: str | os.PathLike) -> None:
    """Move a file, replacing one that is there. Parent folders are created; without the file nothing happens."""
    if os.path.isfile(path):
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, to)


def first_free(path: Path, *, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """Return a path, or ``NAME_2.SUFFIX``, ``NAME_3.SUFFIX``, ... next to it: the first that is not taken.

    Args:
        path: the path that is wanted.
        taken: whether a path must not be used.
    """
    free, number = path, 1
    while taken(free):
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return free


def absolute_path(path: str | os.PathLike) -> Path:
    """Return the absolute path, with ``~`` and ``..`` resolved but not links: one file has one name."""
    return Path(os.path.abspath(Path(path).expanduser()))


def walk_once(folder: str | os.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder as `os.walk` does, into linked folders as well, but into each folder once: links may lead back up."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
        else:
            seen.add(real)
            yield parent, folders, files


def file_hash(path: str | os.PathLike, kind: str = "sha256") -> str:
    """Return the hash of a file's content, in hexadecimal.

    Args:
        path: the file.
        kind: hash algorithm: ``sha1``, ``sha256``, ``md5``, ...

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def file_stamp(path: str | os.PathLike) -> list[int]:
    """Return ``[size in bytes, modification time in ns]``. A file whose stamp differs from a recorded one has changed.

    Raises:
        OSError: the file does not exist or cannot be accessed.
    """
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def folder_lock(path: str | os.PathLike, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, so that only one process at a time works in it.

    The operating system releases the lock when the process ends, however it ends. The lock file stays.

    Args:
        path: lock file, in the folder. It and its parent folders are created.
        wait: wait until no other process holds the lock; False: raise an error if one does.

    Raises:
        BlockingIOError: another process holds the lock (only with ``wait=False``).
        OSError: the lock file cannot be created.

    On a file system without locks it logs a warning and continues: nothing then keeps two processes apart.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no other run that writes there.", path, error.strerror)
        yield
