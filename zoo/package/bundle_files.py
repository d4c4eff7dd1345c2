# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Find and copy the files of a bundle: links become real files, leftovers of runs are skipped."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bundles.common.errors import InputError
from bundles.common.words import did_you_mean

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
#: Contents of a packed bundle, besides its weights.
FOLDERS = ("configs", "docs", "scripts")
FILES = ("LICENSE", "large_files.yml")
#: Leftovers of runs and editors in these folders.
LEFTOVERS = (".*", "__pycache__", "*.pyc", "*.pt", "*.ckpt", "*.tmp", "*.orig", "*.bak", "*~", "mlruns*", "output")
#: Files that Hugging Face and git add next to a bundle's files.
OF_HOSTS = (".cache/huggingface", ".gitattributes", ".git")


def find_bundle(name: str | os.PathLike) -> Path:
    """Return the folder of a bundle of this repository by its name, or any bundle's folder.

    Raises:
        InputError: the folder does not exist, or has no ``configs/metadata.json``.
    """
    known = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))
    folder = BUNDLES / name if str(name) in known else Path(name)
    if not (folder / "configs" / "metadata.json").is_file():
        hint = did_you_mean(name, known)
        raise InputError(
            f"{name} is not a bundle: it has no configs/metadata.json. {hint}Bundles here: {', '.join(known)}."
        )
    return folder.resolve()


def files_of(folder: Path) -> Iterator[Path]:
    """Return all files below a folder, relative to it, sorted by name; links are listed and not followed."""
    found = [
        Path(root, name).relative_to(folder)
        for root, folders, files in os.walk(folder)
        for name in [*files, *(name for name in folders if Path(root, name).is_symlink())]
    ]
    return iter(sorted(found, key=lambda path: path.as_posix()))


def own_files(folder: Path) -> list[Path]:
    """Return `files_of` a bundle without the files that Hugging Face and git add at its top level."""
    return [name for name in files_of(folder) if not any(name.is_relative_to(other) for other in OF_HOSTS)]


def is_leftover(path: Path) -> bool:
    """Return whether any part of a relative path is a leftover of a run or an editor."""
    return any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in LEFTOVERS)


def copy_bundle(source: Path, target: Path) -> None:
    """Copy a bundle without its weights; links become real files and folders.

    Args:
        source: the bundle's folder.
        target: the new folder; it must not exist.

    Raises:
        InputError: a link is broken, or a part of the bundle is missing.
    """
    scripts = source / "scripts"
    parts = [path for path in sorted(scripts.glob("*")) if path.suffix != ".py" and not is_leftover(Path(path.name))]
    dead = [path for path in parts if not (path / "__init__.py").is_file()]
    if dead or not (scripts / "common").exists():
        raise InputError(
            f"{(dead or [scripts / 'common'])[0]} is missing or a broken link: the folder was copied out of the repository without the files it links to, or checked out "
            "without links (git config core.symlinks true). Pack inside the repository, or copy with cp -rL."
        )
    for name in (*FOLDERS, *FILES):
        if not (source / name).exists():
            raise InputError(f"{source / name} is missing: every bundle must have {', '.join((*FOLDERS, *FILES))}.")
    for name in FOLDERS:
        for path in files_of(source / name):
            if not is_leftover(path) and not (source / name / path).exists():
                raise InputError(
                    f"{source / name / path} is a broken link: the folder was copied out of the repository without the files it links to. Copy with cp -rL."
                )
        ignored = shutil.ignore_patterns(*LEFTOVERS)
        shutil.copytree(source / name, target / name, ignore=ignored, copy_function=shutil.copyfile)
    for name in FILES:
        shutil.copyfile(source / name, target / name)
