# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What MONAI Label's server needs of a bundle beyond its config ids: it runs the same files in its own way."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.transforms
from ignite.engine import Engine, Events

from ...common.files import atomic_path
from ...common.run.distributed import rank

logger = logging.getLogger(__name__)

#: The file that MONAI Label writes and starts by ``torchrun``, for several GPUs.
SEVERAL_GPUS = "monailabel_train.json"
SHIPPED = "shipped_model.pt"


def started_by_monai_label(argv: Sequence[str] | None = None) -> bool:
    """Whether MONAI Label runs this training: it then gives the scans, the number of epochs and the device, and no other option.

    Args:
        argv: the words of the command line, ``sys.argv`` by default.
    """
    argv = sys.argv if argv is None else argv
    return "monailabel" in sys.modules or any(SEVERAL_GPUS in word for word in argv)


class Spacingd(monai.transforms.Spacingd):
    """MONAI's own, with texts of the item out of its sight.

    MONAI 1.6 calls ``update`` on every entry whose name begins with ``image_``. MONAI Label puts the text ``image_path`` there.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Resample; texts come back as they are."""
        texts = {key: value for key, value in data.items() if isinstance(value, str)}
        return {**texts, **super().__call__({k: v for k, v in data.items() if k not in texts}, lazy)}


class ReplaceModel:
    """Handler for `SupervisedTrainer`, behind `TrainingCheckpoint`: the result takes the place of the model that the server infers with.

    The model that was there at first stays beside it, as ``shipped_model.pt``; MONAI Label takes it by that name, and has it in its list after its next start.

    Args:
        result: ``model.pt`` of this training.
        served: ``models/model.pt`` of the bundle.
    """

    def __init__(self, *, result: str, served: str) -> None:
        self.result, self.served = Path(result), Path(served)

    def attach(self, engine: Engine) -> None:
        """Replace it when the training is complete, on rank 0 alone."""
        if rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        shipped = self.served.with_name(SHIPPED)
        if self.served.exists() and not shipped.exists():
            _copy(self.served, shipped)
        _copy(self.result, self.served)
        logger.info("%s is now the model of this training; the first one is %s", self.served, shipped.name)


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
