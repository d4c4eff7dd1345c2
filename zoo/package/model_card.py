# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Bundles in Hugging Face form: the files at the root of a repository, and a model card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from bundles.common.files import write_text

from .bundle_files import OF_HOSTS


def write_hugging_face(bundle: Path, target: Path) -> None:
    """Write the files of a bundle and its model card.

    The card is ``docs/README.md`` plus the metadata header that the hub reads. ``docs/README.md`` itself is excluded:
    `push_to_hf_hub` would replace the card with it, with a poorer header and broken links.

    Args:
        bundle: the packed bundle, without links.
        target: the folder to write. What is there is replaced, except what git and the hub keep in it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # a run that was killed between two renamings
        old.rename(target)
    _keep_of_hosts(old, target)
    shutil.rmtree(new, ignore_errors=True)
    try:
        shutil.copytree(bundle, new)
        readme = new / "docs" / "README.md"
        write_text(new / "README.md", model_card(bundle, readme.read_text(encoding="utf-8")))
        readme.unlink()
        if not any(readme.parent.iterdir()):
            readme.parent.rmdir()
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _keep_of_hosts(old, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _keep_of_hosts(old: Path, target: Path) -> None:
    """Move what git and the hub keep in a package to the one that has replaced it, then remove the earlier one."""
    for name in OF_HOSTS:
        if (old / name).exists() and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(target / name)
    if not any((old / name).exists() for name in OF_HOSTS):
        shutil.rmtree(old, ignore_errors=True)


def model_card(bundle: Path, readme: str) -> str:
    """Return the text of the model card.

    Args:
        bundle: folder of the bundle, for its ``configs/metadata.json``.
        readme: text of ``docs/README.md``, in which links to files of the bundle begin with ``../``.
    """
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    pred, image = metadata["network_data_format"]["outputs"]["pred"], metadata["network_data_format"]["inputs"]["image"]
    is_segmentation = pred["format"] == "segmentation"
    head: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": "monai",
        "pipeline_tag": "image-segmentation" if is_segmentation else "image-feature-extraction",
        "tags": [
            "monai",
            "medical",
            "swin-unetr",
            str(image["modality"]).lower(),
            *([] if is_segmentation else ["self-supervised"]),
        ],
    }
    text = re.sub(r"\]\(\.\./", "](", readme)
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{text}"
