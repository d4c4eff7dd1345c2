# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A zip archive of a bundle that has the same bytes whoever packs it, when and where."""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from bundles.common.errors import InputError

from .bundle_files import files_of

LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can tell
PERMISSIONS = stat.S_IFREG | 0o644
UNIX = 3
ENCRYPTED = 1  # a bit of an entry's flags


def write_archive(folder: Path, path: Path, *, leave_out: frozenset[str] = frozenset()) -> None:
    """Write all files below a folder into a zip, under the folder's own name.

    Sorted names, one time, one set of permissions, and no compression: weights hardly compress, and what zlib makes of
    the rest changes with its version.

    Args:
        folder: the bundle; it must hold no links.
        path: the zip.
        leave_out: files that stay out, relative to the folder, with ``/``.
    """
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_STORED) as archive:
        for name in files_of(folder):
            if name.as_posix() in leave_out:
                continue
            entry = zipfile.ZipInfo(f"{folder.name}/{name.as_posix()}", date_time=LONG_AGO)
            entry.external_attr, entry.create_system = PERMISSIONS << 16, UNIX
            entry.file_size = (folder / name).stat().st_size
            with open(folder / name, "rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def extract_archive(path: Path, target: Path) -> Path:
    """Unpack a zip into a folder, and return the bundle's folder in it.

    Raises:
        InputError: if it is no zip, is encrypted, holds links, leads out of the folder, or has more or less than one folder at its top.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise InputError(
                        f"{path} holds the link {entry.filename}, which clients unpack as a text file: pack anew."
                    )
                if entry.flag_bits & ENCRYPTED:
                    raise InputError(
                        f"{path} is encrypted ({entry.filename}), and clients have no password: pack anew."
                    )
                parts = PurePosixPath(entry.filename).parts
                if not parts:
                    raise InputError(f"{path} holds the entry {entry.filename!r}, which names no file: pack anew.")
                if ".." in parts or entry.filename.startswith("/") or "\\" in entry.filename:
                    raise InputError(
                        f"{path} holds {entry.filename!r}, which leads out of the folder: it was not unpacked."
                    )
            tops = sorted({PurePosixPath(entry.filename).parts[0] for entry in archive.infolist()})
            if len(tops) != 1 or all(entry.filename == tops[0] for entry in archive.infolist()):
                raise InputError(f"{path} must hold one folder, the bundle; it holds {', '.join(tops) or 'nothing'}.")
            archive.extractall(target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read as a zip: {error}. Pack or download it again.") from error
    return target / tops[0]


def file_hash(path: Path, kind: str) -> str:
    """Hash of a file's bytes, in hexadecimal.

    Args:
        path: the file.
        kind: ``sha1``, ``sha256``, ``md5``, ...
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
