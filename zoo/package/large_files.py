# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""``large_files.yml``: weights that lie beside a package instead of in it, each with its address and hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bundles.common.errors import InputError
from bundles.common.files import write_text

from .archive import file_hash
from .bundle_files import files_of

LARGE = 25_000_000  # bytes; the zoo takes no larger file into a bundle
LIST = "large_files.yml"
HASHES = ("md5", "sha1", "sha256", "sha512")  # those of MONAI's check_hash


def large_files(folder: Path) -> list[str]:
    """Files of a package that are larger than the zoo takes."""
    return [name.as_posix() for name in files_of(folder) if (folder / name).stat().st_size > LARGE]


def list_large_files(folder: Path, url_prefix: str | None) -> list[str]:
    """Write ``large_files.yml`` of a package, and return the files to leave out of its zip.

    Args:
        folder: the bundle.
        url_prefix: the address at which ``models/model.pt`` will be found, without that. None: nothing is left out.
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
    head = "# Files that lie elsewhere; python -m monai.bundle download_large_files --bundle_path . fetches them.\n"
    write_text(folder / LIST, head + yaml.safe_dump({"large_files": entries}, sort_keys=False))
    return large


def read_large_files(folder: Path) -> list[dict[str, Any]]:
    """Entries of ``large_files.yml``.

    Raises:
        InputError: if it is no such list, or an entry lacks something.
    """
    path = folder / LIST
    if not path.is_file():
        return []
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = content.get("large_files") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{LIST} must hold a list under large_files.")
    for entry in entries:
        missing = [
            key for key in ("path", "url", "hash_val", "hash_type") if not (isinstance(entry, dict) and entry.get(key))
        ]
        if missing:
            raise InputError(f"{LIST}: {entry} lacks {', '.join(missing)}.")
        if entry["hash_type"] not in HASHES:
            raise InputError(
                f"{LIST}: {entry['path']} has hash_type {entry['hash_type']!r}; clients know {', '.join(HASHES)}."
            )
    return entries
