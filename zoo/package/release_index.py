# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""``model_info.json``, the list of released packages: the bytes of a released version never change."""

from __future__ import annotations

import json
from pathlib import Path

from bundles.common.errors import InputError
from bundles.common.files import write_text

INDEX = "model_info.json"


def read_index(path: Path) -> dict[str, dict[str, str]]:
    """Read the list; empty if the file does not exist.

    Returns:
        ``{NAME_vVERSION: {"checksum": sha1 of the zip, "source": url}}``.

    Raises:
        InputError: if the file is not such a list.
    """
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON ({error}). Repair the file: it records which versions are released."
        ) from error
    if not isinstance(index, dict) or not all(
        isinstance(entry, dict) and "checksum" in entry for entry in index.values()
    ):
        raise InputError(f"{path} must contain entries NAME_vVERSION: {{checksum, source}}. Repair the file.")
    return index


def released(path: Path, *, package: str, checksum: str) -> bool:
    """Return whether the list contains this package with this checksum.

    Args:
        path: ``model_info.json``.
        package: ``NAME_vVERSION``.
        checksum: sha1 of the zip.

    Raises:
        InputError: if it contains the package with another checksum.
    """
    entry = read_index(path).get(package)
    if entry is not None and entry["checksum"] != checksum:
        raise InputError(
            f"{package} was released with other bytes: {path} has sha1 {entry['checksum']}, this package {checksum}. "
            "Users of the released version would not notice the change. Raise version in configs/metadata.json, "
            f"describe the change in its changelog, and pack again; or, if {package} was never published, remove its "
            f"entry from {path}."
        )
    return entry is not None


def add_to_index(path: Path, *, package: str, checksum: str, url_prefix: str | None) -> None:
    """Add a package to the list.

    Args:
        path: ``model_info.json``; created if it does not exist.
        package: ``NAME_vVERSION``.
        checksum: sha1 of the zip.
        url_prefix: URL of the folder that will contain the zip. None: keep the source that is already in the list, else
            use the file name, which fits a zip next to the list.

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
