# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""``large_files.yml``: lists weights that are hosted outside of a package, each with its URL and hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bundles.common.errors import InputError
from bundles.common.files import write_text

from .archive import file_hash
from .bundle_files import files_of

LARGE = 25_000_000  # bytes; the zoo accepts no larger file in a bundle
LIST = "large_files.yml"
HASHES = ("md5", "sha1", "sha256", "sha512")  # supported by MONAI's check_hash


def large_files(folder: Path) -> list[str]:
    """Return the files of a package that are too large for the zoo."""
    return [name.as_posix() for name in files_of(folder) if (folder / name).stat().st_size > LARGE]


def list_large_files(folder: Path, url_prefix: str | None) -> list[str]:
    """Write ``large_files.yml`` of a package; return the files to exclude from its zip.

    Args:
        folder: the bundle.
        url_prefix: URL to which paths such as ``models/model.pt`` are appended. None: no file is excluded.
    """
    large = large_files(folder) if url_prefix else []
    entries = [
        {
            "path": name,
            "url": f"{str(url_prefix).rstrip('/')}/{name}",
            "hash_val": file_hash(folder / name, "sha256"),
            "hash_type": "sha256",
        }
        for name in large
    ]
    head = "# Files outside of this package. Download: python -m monai.bundle download_large_files --bundle_path .\n"
    write_text(folder / LIST, head + yaml.safe_dump({"large_files": entries}, sort_keys=False))
    return large


def read_large_files(folder: Path) -> list[dict[str, Any]]:
    """Read the entries of ``large_files.yml``; empty if the file does not exist.

    Raises:
        InputError: if the file is not such a list, or an entry is incomplete.
    """
    path = folder / LIST
    if not path.is_file():
        return []
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = content.get("large_files") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{LIST} must contain a list under large_files.")
    for entry in entries:
        missing = [
            key for key in ("path", "url", "hash_val", "hash_type") if not (isinstance(entry, dict) and entry.get(key))
        ]
        if missing:
            raise InputError(f"{LIST}: {entry} lacks {', '.join(missing)}.")
        if entry["hash_type"] not in HASHES:
            raise InputError(
                f"{LIST}: {entry['path']} has hash_type {entry['hash_type']!r}; clients support {', '.join(HASHES)}."
            )
    return entries
