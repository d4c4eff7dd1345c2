# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A converted network in files next to its weights, with a record of what it was made from.

``model.pt`` has ``model.openvino_96x96x96.xml`` (operations), ``.bin`` (weights) and ``.json`` (record) for windows of
96^3. The record names the network by the content of its weights, the versions that converted it, and the hashes of
both files: what does not match all of them is not used. The record is written last and removed first, so that a
process that is stopped in between leaves nothing that counts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...common.files import atomic_path, file_hash, write_text
from ...common.words import listed
from .openvino_network import load_openvino, version

logger = logging.getLogger(__name__)

CONVERSION = 1  # version of this code: raise it when `convert` makes another network from the same weights


def network_hash(network: torch.nn.Module) -> str:
    """Return the SHA-256 of a network's modules and weights. Patch merging shows only in the modules."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def made_from(network: torch.nn.Module, *, channels: int, roi_size: Sequence[int]) -> dict[str, Any]:
    """Return everything that decides a conversion, as JSON types."""
    return {
        "weights": network_hash(network),
        "channels": channels,
        "window": list(roi_size),
        "openvino": version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "monai")},
        "conversion": CONVERSION,
    }


class KeptConversion:
    """The files of one conversion.

    Args:
        weights: the file of the weights.
        source: from `made_from`.
    """

    def __init__(self, weights: str | os.PathLike, source: Mapping[str, Any]) -> None:
        weights = Path(weights)
        stem = f"{weights.stem}.openvino_{'x'.join(map(str, source['window']))}"
        self.operations, self.tensors, self.record = (
            weights.with_name(stem + suffix) for suffix in (".xml", ".bin", ".json")
        )
        self.source = dict(source)

    def read(self) -> tuple[Any, dict[str, float]] | None:
        """Return the network as an ``openvino.Model``, and its differences from PyTorch by processor and precision.

        None, with a line in the log, if there is none, or if it is damaged or was made from something else.
        """
        if not self.record.exists():
            return None
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            source, checked = record["made_from"], {str(cpu): float(off) for cpu, off in record["checked"].items()}
            if source != self.source:
                changed = sorted(name for name in self.source if source.get(name) != self.source[name])
                logger.info("%s was made from other %s: it is made anew", self.operations, listed(changed or ["facts"]))
                return None
            damaged = [
                path for path in (self.operations, self.tensors) if file_hash(path) != record["files"][path.name]
            ]
            if damaged:
                raise ValueError(f"{damaged[0].name} is not the file that was written")
            return load_openvino().Core().read_model(self.operations), checked
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("%s is damaged (%s): it is made anew", self.record, reason)
            return None

    def write(self, model: Any, checked: Mapping[str, float]) -> None:
        """Write the files; each is complete or absent.

        Raises:
            OSError: the folder cannot be written.
        """
        self.record.unlink(missing_ok=True)
        with atomic_path(self.operations) as xml, atomic_path(self.tensors) as bin_file:
            load_openvino().serialize(model, str(xml), str(bin_file))  # fp32, unlike save_model
            hashes = {self.operations.name: file_hash(xml), self.tensors.name: file_hash(bin_file)}
        record = {"made_from": self.source, "files": hashes, "checked": dict(checked)}
        write_text(self.record, json.dumps(record, indent=1) + "\n")

    def note(self, checked: Mapping[str, float]) -> None:
        """Write the differences of further processors into the record.

        Raises:
            OSError: the folder cannot be written.
        """
        record = json.loads(self.record.read_text(encoding="utf-8"))
        write_text(self.record, json.dumps({**record, "checked": dict(checked)}, indent=1) + "\n")
