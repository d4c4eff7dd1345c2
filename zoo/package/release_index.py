# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""``model_info.json``, the list of released packages: a version has one set of bytes for ever."""

from __future__ import annotations

import json
from pathlib import Path

from bundles.common.errors import InputError
from bundles.common.files import write_text

INDEX = "model_info.json"


def read_index(path: Path) -> dict[str, dict[str, str]]:
    """Read the list: ``NAME_vVERSION`` to ``{"checksum": sha1 of the zip, "source": url}``; empty where there is none.

    Raises:
        InputError: if it is no such list.
    """
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): mend it, it says which versions are released.") from error
    if not isinstance(index, dict) or not all(
        isinstance(entry, dict) and "checksum" in entry for entry in index.values()
    ):
        raise InputError(f"{path} must hold entries NAME_vVERSION: {{checksum, source}}: mend it.")
    return index


def released(path: Path, *, package: str, checksum: str) -> bool:
    """Whether the list names this package with these bytes.

    Args:
        path: ``model_info.json``.
        package: ``NAME_vVERSION``.
        checksum: sha1 of the zip.

    Raises:
        InputError: if it names it with other bytes.
    """
    entry = read_index(path).get(package)
    if entry is not None and entry["checksum"] != checksum:
        raise InputError(
            f"{package} was released with other bytes: {path} has sha1 {entry['checksum']}, this package {checksum}. Whoever has "
            "the released one would not notice: raise version in configs/metadata.json, say in its changelog what changed, and pack again; "
            f"or, if it was never published, remove its entry from {path}."
        )
    return entry is not None


def add_to_index(path: Path, *, package: str, checksum: str, url_prefix: str | None) -> None:
    """Name a package in the list.

    Args:
        path: ``model_info.json``, made where it is not there.
        package: ``NAME_vVERSION``.
        checksum: sha1 of the zip.
        url_prefix: address of the folder that the zip will lie in. None: the address that the list has of it already, else the
            name of the file alone, which is true of a zip beside the list.

    Raises:
        InputError: see `read_index` and `released`.
    """
    released(path, package=package, checksum=checksum)
    index = read_index(path)
    file = f"{package}.zip"
    known = index.get(package, {}).get("source", file)
    source = known if url_prefix is None else f"{url_prefix.rstrip('/')}/{file}"
    index[package] = {"checksum": checksum, "source": source}
    write_text(path, json.dumps(dict(sorted(index.items())), indent=4) + "\n")
