# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Section on the packed weights for a package's README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bundles.common.errors import InputError
from bundles.common.files import write_text

from .archive import file_hash
from .packed_weights import Weights


def add_weights_note(readme: Path, weights: Weights, *, packed: Path, about: Path | None = None) -> None:
    """Append a section to a README with the information recorded in the weights.

    Args:
        readme: ``docs/README.md`` of the package.
        weights: information recorded in ``model.pt``.
        packed: ``model.pt`` in the package.
        about: Markdown that goes before it: data and their licence, scores, what the model is not for. Its headings
            begin with ``##``.

    Raises:
        InputError: ``about`` does not exist.
    """
    if about is not None and not about.is_file():
        raise InputError(f"--about {about} does not exist. Pass a Markdown file.")
    trained, encoder = weights.trained, weights.encoder
    start = trained.get("start")
    recorded: dict[str, Any] = {
        "sha256": f"`{file_hash(packed, 'sha256')}`",
        "preset": trained.get("preset"),
        "steps": trained.get("steps"),
        "feature size": encoder.get("feature_size"),
        "depths": encoder.get("depths"),
        "patch-merging order": encoder.get("merging"),
        "spacing, mm": trained.get("spacing"),
        "HU window": trained.get("hu_window"),
        "ROI": trained.get("roi_size"),
        "training cases": (trained.get("scans") or {}).get("number"),
        "of these with carried labels": (trained.get("cases") or {}).get("carried") or None,
        "held-out cases": (trained.get("validation_scans") or {}).get("number"),
        "started from": ("scratch" if start is None else Path(start["file"]).name) if "start" in trained else None,
        "cosine to the start weights, median": ", ".join(
            f"{part} {value:.3f}" for part, value in (trained.get("moved") or {}).get("median_cosine", {}).items()
        ),
        "score on held-out cases": ", ".join(
            f"{name} {value:.4f}" for name, value in (trained.get("score") or {}).items() if value is not None
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in (trained.get("versions") or {}).items()),
    }
    rows = [f"| {name} | {value} |" for name, value in recorded.items() if value not in (None, "")]
    text = readme.read_text(encoding="utf-8").rstrip("\n")
    note = "\n".join(
        ["## Weights of this package", "", "As recorded in `models/model.pt`:", "", "| | |", "|---|---|", *rows]
    )
    sections = [text, *([about.read_text(encoding="utf-8").strip("\n")] if about is not None else []), note]
    write_text(readme, "\n\n".join(sections) + "\n")
