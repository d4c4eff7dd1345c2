# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What is known of the weights in a package, in words for its README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bundles.common.files import write_text

from .archive import file_hash
from .packed_weights import Weights


def add_weights_note(readme: Path, weights: Weights) -> None:
    """Put a section on the weights at the end of a README: what their file says, no more.

    Args:
        readme: ``docs/README.md`` of the copy.
        weights: what ``model.pt`` says.
    """
    trained, encoder = weights.trained, weights.encoder
    start = trained.get("start")
    said: dict[str, Any] = {
        "sha256": f"`{file_hash(weights.path, 'sha256')}`",
        "preset": trained.get("preset"),
        "steps": trained.get("steps"),
        "feature size": encoder.get("feature_size"),
        "depths": encoder.get("depths"),
        "order of patch merging": encoder.get("merging"),
        "spacing, mm": trained.get("spacing"),
        "HU window": trained.get("hu_window"),
        "ROI": trained.get("roi_size"),
        "cases trained on": (trained.get("scans") or {}).get("number"),
        "cases held out": (trained.get("validation_scans") or {}).get("number"),
        "started from": ("scratch" if start is None else Path(start["file"]).name) if "start" in trained else None,
        "score on the cases held out": ", ".join(
            f"{name} {value:.4f}" for name, value in (trained.get("score") or {}).items() if value is not None
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in (trained.get("versions") or {}).items()),
    }
    rows = [f"| {name} | {value} |" for name, value in said.items() if value not in (None, "")]
    text = readme.read_text(encoding="utf-8").rstrip("\n")
    note = "\n".join(
        ["## Weights of this package", "", "What `models/model.pt` says of itself:", "", "| | |", "|---|---|", *rows]
    )
    write_text(readme, f"{text}\n\n{note}\n")
