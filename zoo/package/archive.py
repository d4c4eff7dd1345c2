# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Reproducible zip archives of bundles: the bytes do not depend on who packs, when and where."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from bundles.common.errors import InputError
from bundles.common.files import file_hash as file_hash  # also for who reads archives
from bundles.common.words import sentence

from .bundle_files import files_of

FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can store
PERMISSIONS = stat.S_IFREG | 0o644
UNIX = 3  # the system that "created" the entries
MAX_ENTRIES = 10_000
MAX_DEPTH = 50  # folders
MAX_RATIO = 20  # of text in zips that others compressed; weights barely compress
SMALL = 2**26  # bytes of a zip of configs without weights
ENCRYPTED = 1  # bit of an entry's flags


def write_archive(folder: Path, path: Path, *, leave_out: frozenset[str] = frozenset()) -> None:
    """Write all files of a folder into a zip, under the folder's name.

    Names are sorted; all entries have the same time and permissions. Nothing is compressed: weights barely compress,
    and the output of zlib depends on its version.

    Args:
        folder: the bundle; it must not contain links.
        path: the zip to write.
        leave_out: files to skip, as paths relative to the folder with ``/``.
    """
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_STORED) as archive:
        for name in files_of(folder):
            if name.as_posix() in leave_out:
                continue
            entry = zipfile.ZipInfo(f"{folder.name}/{name.as_posix()}", date_time=FIXED_TIME)
            entry.external_attr, entry.create_system = PERMISSIONS << 16, UNIX
            entry.file_size = (folder / name).stat().st_size
            with open(folder / name, "rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def extract_archive(path: Path, target: Path) -> Path:
    """Unpack a zip into a folder; return the bundle's folder in it.

    Raises:
        InputError: if it is not a zip, unpacks to far more than its size, is encrypted, contains links, has entries outside of the target folder, or does
            not have exactly one folder at its top level. Nothing is unpacked then.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise InputError(
                        f"{path} contains the link {entry.filename}, which clients unpack as text. Pack it again."
                    )
                if entry.flag_bits & ENCRYPTED:
                    raise InputError(
                        f"{path} is encrypted ({entry.filename}), and clients have no password. Pack it again."
                    )
                parts = PurePosixPath(entry.filename).parts
                if not parts:
                    raise InputError(f"{path} contains the entry {entry.filename!r}, which is no file. Pack it again.")
                if len(parts) > MAX_DEPTH:
                    raise InputError(
                        f"{path} contains an entry {len(parts)} folders deep, {entry.filename[:60]!r}...: it is no package "
                        "of a bundle, and was not unpacked."
                    )
                if ".." in parts or entry.filename.startswith("/") or "\\" in entry.filename:
                    raise InputError(
                        f"{path} contains {entry.filename!r}, which is outside of the folder. The zip was not unpacked."
                    )
            tops = sorted({PurePosixPath(entry.filename).parts[0] for entry in archive.infolist()})
            if len(tops) != 1 or all(entry.filename == tops[0] for entry in archive.infolist()):
                raise InputError(
                    f"{path} must contain one folder, the bundle, but contains {', '.join(tops) or 'nothing'}."
                )
            _check_sizes(path, archive.infolist(), target)
            archive.extractall(target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a zip: {sentence(str(error))} Pack or download it again."
        ) from error
    return target / tops[0]


def _check_sizes(path: Path, entries: list[zipfile.ZipInfo], target: Path) -> None:
    """Refuse a zip that unpacks to far more than its size.

    zipfile reads no more of an entry than the directory says.
    """
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if len(entries) > MAX_ENTRIES or claimed > max(MAX_RATIO * size, SMALL):
        raise InputError(
            f"{path} claims {len(entries)} entries of {claimed} bytes in a file of {size}: it is no package of a bundle, and "
            "was not unpacked. Do not trust it."
        )
    if claimed > (free := shutil.disk_usage(target if target.exists() else target.parent).free):
        raise InputError(f"{path} unpacks to {claimed} bytes, but {target} has {free} free. Free some space.")
