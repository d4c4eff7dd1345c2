# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Check a bundle's files against the requirements of the zoo and its clients, without building the network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

from bundles.common.errors import InputError
from bundles.segmentation.models.label_names import read_labels

from ..package.archive import file_hash
from ..package.bundle_files import is_leftover, own_files
from ..package.json_copies import COPIED, differing_copies
from ..package.large_files import LARGE, LIST, read_large_files
from ..package.names import check_name
from ..package.packed_weights import BESIDE, open_safely, read_weights
from .machine_paths import check_machine_paths

EXACT = re.compile(r"\d+(\.\w+)*")
CORE = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}


class NotChecked(Exception):
    """A check that could not be run here; the message states why."""


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the content of ``configs/metadata.json``.

    Raises:
        InputError: it is missing or not a JSON object.
    """
    path = folder / "configs" / "metadata.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"configs/metadata.json cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError("configs/metadata.json must be a JSON object.")
    return content


def check_version(folder: Path) -> None:
    """Check that the version is in the changelog, and that clients will treat it as the latest."""
    metadata = read_metadata(folder)
    version, changelog = metadata.get("version"), metadata.get("changelog")
    if not isinstance(version, str) or not EXACT.fullmatch(version):
        raise InputError(
            f"version {version!r} in configs/metadata.json must be numbers separated by dots, such as 0.1.0."
        )
    if not isinstance(changelog, dict) or not changelog.get(version):
        raise InputError(
            f"version {version} is missing from the changelog of configs/metadata.json: add what has changed."
        )
    latest = max(changelog)
    if latest != version:
        raise InputError(
            f"version {version}: clients sort versions as text, and would treat {latest} of the changelog as the latest. "
            "Choose a version that sorts after it."
        )


def check_licence(folder: Path) -> None:
    """Check that ``LICENSE`` exists."""
    if not (folder / "LICENSE").is_file():
        raise InputError("LICENSE is missing.")


def check_readme(folder: Path) -> None:
    """Check that a README exists, in ``docs`` or, in a Hugging Face repository, at the root."""
    if not any((folder / name).is_file() for name in ("docs/README.md", "README.md")):
        raise InputError("docs/README.md is missing.")


def check_metadata(folder: Path) -> None:
    """Check the metadata that clients read."""
    formats = read_metadata(folder).get("network_data_format", {})
    for kind, name in (("inputs", "image"), ("outputs", "pred")):
        tensor = formats.get(kind, {}).get(name)
        if not isinstance(tensor, dict):
            raise InputError(f"network_data_format must have {kind}: {name}, which verify_net_in_out reads.")
        channels, named = tensor.get("num_channels"), tensor.get("channel_def", {})
        if len(named) != channels:
            raise InputError(f"{name} has num_channels {channels}, but channel_def names {len(named)}: {named}.")
        bounds = tensor.get("value_range")
        if not isinstance(bounds, list) or not bounds or not all(isinstance(bound, (int, float)) for bound in bounds):
            raise InputError(f"{name} has value_range {bounds!r}, but it must be a list of numbers, such as [0, 1].")


def check_schema(folder: Path, schema: Path | None) -> None:
    """Validate the metadata against their schema.

    Args:
        folder: the bundle.
        schema: a copy of the schema, or None.
    """
    if schema is None:
        raise NotChecked("no copy of the schema: pass one as --schema FILE")
    try:
        import jsonschema
    except ImportError:
        raise NotChecked("the package jsonschema is not installed") from None
    metadata = read_metadata(folder)
    try:
        jsonschema.validate(instance=metadata, schema=json.loads(schema.read_text(encoding="utf-8")))
    except jsonschema.ValidationError as error:
        raise InputError(f"{'/'.join(map(str, error.absolute_path)) or 'metadata.json'}: {error.message}") from error


def check_weights(folder: Path) -> None:
    """Check that weights and an inference config exist, and that clients can open the weights."""
    read_weights(folder / "models")
    for name in BESIDE.get(folder.name, ()):
        if (folder / "models" / name).is_file():
            open_safely(folder / "models" / name)
    if not any((folder / "configs" / f"inference.{suffix}").is_file() for suffix in ("json", "yaml", "yml")):
        raise InputError("configs/inference.json or inference.yaml is missing.")


def check_labels(folder: Path) -> None:
    """Check that the structures in the metadata, shown by MONAI Label, are those that the weights were trained for."""
    weights = read_weights(folder / "models")
    if weights.labels is None:
        return
    named = read_labels(str(folder / "configs" / "metadata.json"))
    if {str(value): str(name) for value, name in weights.labels.items()} != named:
        raise InputError(
            f"models/model.pt was trained for the labels {weights.labels}, but configs/metadata.json (channel_def of pred) has {named}. "
            "Pass weights with these labels as --models. For other labels, pack your own task: swin_unetr_msd --task FILE.yaml."
        )


def check_large_files(folder: Path) -> None:
    """Check that the files listed in ``large_files.yml`` exist and have the listed hash."""
    for entry in read_large_files(folder):
        path = folder / entry["path"]
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{LIST}: {entry['path']} is outside the bundle.")
        if not path.is_file():
            raise InputError(
                f"{entry['path']} is missing. Unpack the bundle, download the file with python -m monai.bundle download_large_files "
                "--bundle_path FOLDER, and verify that folder."
            )
        found = file_hash(path, entry["hash_type"])
        if found != entry["hash_val"]:
            raise InputError(
                f"{entry['path']} has {entry['hash_type']} {found}, but {LIST} lists {entry['hash_val']}: download it again."
            )


def check_sizes(folder: Path) -> None:
    """Check that no file is over the zoo's size limit, unless it is listed in ``large_files.yml``."""
    listed = {entry["path"] for entry in read_large_files(folder)}
    large = {name.as_posix(): (folder / name).stat().st_size for name in own_files(folder) if (folder / name).exists()}
    too_large = [f"{name} ({size / 1e6:.0f} MB)" for name, size in large.items() if size > LARGE and name not in listed]
    if too_large:
        raise InputError(f"over {LARGE / 1e6:.0f} MB: {', '.join(too_large)}. Pack with --large_files_url.")


def check_real_files(folder: Path) -> None:
    """Check that there are no links and no leftovers of a run or an editor."""
    names = own_files(folder)
    links = [name.as_posix() for name in names if (folder / name).is_symlink()]
    if links:
        raise InputError(f"links, which become text files in a zip: {', '.join(links[:5])}. Pack the bundle.")
    left = [name.as_posix() for name in names if name.parts[0] != "models" and is_leftover(name)]
    if left:
        raise InputError(f"left by a run or an editor: {', '.join(left[:5])}. Remove them, or pack again.")


def check_json(folder: Path) -> None:
    """Check that the configs that clients read exist as JSON, indented by 4 and equal to their YAML versions."""
    names = [f"configs/{name}.json" for name in COPIED]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"missing: {', '.join(missing)}. Clients such as monai.bundle.load cannot read YAML: pack the bundle."
        )
    for path in sorted((folder / "configs").glob("*.json")):
        text = path.read_text(encoding="utf-8").rstrip("\n")
        content = json.loads(text)
        if text not in (json.dumps(content, indent=4), json.dumps(content, indent=4, ensure_ascii=False)):
            raise InputError(f"{path.name} is not indented by 4.")
    if differing := differing_copies(folder / "configs"):
        raise InputError(
            f"{', '.join(differing)} differs from the YAML file of the same name: change both, or neither."
        )


def check_folder_name(folder: Path) -> None:
    """Check that clients read the bundle's name correctly."""
    check_name(folder.name)


def check_packages(folder: Path) -> None:
    """Check that packages are pinned, and installed in the pinned versions; this verification applies only to those."""
    metadata = read_metadata(folder)
    pinned = {package: metadata.get(key) for key, package in CORE.items()}
    more = metadata.get("required_packages_version")
    if not isinstance(more, dict):
        raise InputError(
            f"required_packages_version in configs/metadata.json is {more!r}, but it must map packages to versions ({{}} if there are none)."
        )
    pinned |= more
    loose = [
        f"{name} {version!r}"
        for name, version in pinned.items()
        if not isinstance(version, str) or not EXACT.fullmatch(version)
    ]
    if loose:
        raise InputError(f"not pinned to one version: {', '.join(loose)}.")
    others = [
        f"{name} {version} (here {here})" for name, version in pinned.items() if (here := _installed(name)) != version
    ]
    if others:
        raise InputError(f"installed versions differ from the metadata: {', '.join(others)}.")


def check_paths(folder: Path) -> None:
    """Check that no config contains a path of a particular machine."""
    check_machine_paths(folder / "configs")


def _installed(name: str) -> str:
    try:
        return (torch.__version__ if name == "torch" else installed_version(name)).partition("+")[0]
    except PackageNotFoundError:
        return "none"


#: Checks in display order. `verify` adds `check_schema`, which needs another argument.
CHECKS: dict[str, Callable[[Path], None]] = {
    "licence": check_licence,
    "readme": check_readme,
    "name": check_folder_name,
    "only regular files": check_real_files,
    "metadata": check_metadata,
    "version and changelog": check_version,
    "packages": check_packages,
    "JSON": check_json,
    "no paths of one machine": check_paths,
    "large files": check_large_files,
    "sizes": check_sizes,
    "weights": check_weights,
    "labels": check_labels,
}
