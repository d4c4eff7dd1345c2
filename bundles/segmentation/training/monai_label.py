# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Support for MONAI Label, whose server runs the bundle's training config in its own way."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.transforms
from ignite.engine import Engine, Events

from ...common.files import atomic_path, file_hash, first_free, write_text
from ...common.run.distributed import rank

logger = logging.getLogger(__name__)

#: The config file that MONAI Label writes, and runs with ``torchrun``, to train on several GPUs.
SEVERAL_GPUS = "monailabel_train.json"
SHIPPED = "shipped_model.pt"


def started_by_monai_label(argv: Sequence[str] | None = None) -> bool:
    """Return whether MONAI Label runs this training. It sets only the scans, the number of epochs and the device.

    Args:
        argv: the command-line arguments, ``sys.argv`` by default.
    """
    argv = sys.argv if argv is None else argv
    return "monailabel" in sys.modules or any(SEVERAL_GPUS in word for word in argv)


class Spacingd(monai.transforms.Spacingd):
    """MONAI's `Spacingd`, called without the string entries of the item.

    MONAI 1.6 calls ``update`` on every entry whose key begins with ``image_``. This fails for the string ``image_path``
    that MONAI Label adds.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Resample; strings are returned unchanged."""
        texts = {key: value for key, value in data.items() if isinstance(value, str)}
        return {**texts, **super().__call__({k: v for k, v in data.items() if k not in texts}, lazy)}


class ReplaceModel:
    """Handler for `SupervisedTrainer`: replaces the model that the server uses for inference by the trained one.

    List it after `TrainingCheckpoint`. The original model is kept next to it as ``shipped_model.pt``, that of a newer
    package, which was unpacked over this one, as ``shipped_model_2.pt``, ... MONAI Label can load them by these names,
    and lists them after its next start.

    Args:
        result: ``model.pt`` of this training.
        served: ``models/model.pt`` of the bundle.
    """

    def __init__(self, *, result: str, served: str) -> None:
        self.result, self.served = Path(result), Path(served)

    def attach(self, engine: Engine) -> None:
        """Replace the model when the training is complete, on rank 0 only."""
        if rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        kept = self.served.with_name(SHIPPED)
        if self.served.exists() and (not kept.exists() or self._is_new()):
            kept = first_free(kept)
            _copy(self.served, kept)
        write_text(self.record, file_hash(self.result) + "\n")  # before it is served: if it never is, nothing is lost
        _copy(self.result, self.served)
        logger.info("%s is now the model of this training; the original one is kept as %s", self.served, kept.name)

    @property
    def record(self) -> Path:
        """The file that says which model is served since the last training."""
        return self.result.with_name(".served.sha256")

    def _is_new(self) -> bool:
        """Return whether somebody replaced the model of the last training with another one."""
        try:
            return self.record.read_text(encoding="utf-8").strip() != file_hash(self.served)
        except OSError:  # trained by an earlier version: it is that of the last training
            return False


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
