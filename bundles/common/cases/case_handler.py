# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Base class of the evaluator handlers that write something for each case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.data import MetaTensor

from ..data.case_names import case_name, case_names, image_file, image_file_of, items_of
from ..errors import InputError
from .failures import Failures


class CaseHandler(ABC):
    """Handler of an evaluator: calls `case_completed` for each case.

    The evaluator must decollate (MONAI's default), and its postprocessing must invert the predicted label map to the
    scan's geometry.

    Args:
        output_dir: the folder of the results.
        pred_key: key of the predicted label map, a MetaTensor (1, X, Y, Z) in the geometry of the scan.
        image_key: key of the image, whose metadata names the file of the scan.
        label_key: key of the true label map, a MetaTensor (1, X, Y, Z); None: the handler needs none.
        items: all cases, the same in all processes: dictionaries with the files of ``image_key``. Cases with the same
            file name in several folders then get unique names (see `case_names`).
        names: unique name of each image file, where they are known without ``items``.
        failures: takes the cases for which the handler raises; the other handlers and cases continue. None: the error
            ends the run.
    """

    #: What a case lacks if the handler raises for it.
    product = "result"

    def __init__(
        self,
        output_dir: str | Path,
        *,
        pred_key: str = "pred",
        image_key: str = "image",
        label_key: str | None = None,
        items: Sequence[Mapping[str, Any]] | None = None,
        names: Mapping[str, str] | None = None,
        failures: Failures | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.pred_key = pred_key
        self.image_key = image_key
        self.label_key = label_key
        self.failures = failures
        # By image file and not by case name: two folders may contain files of the same name.
        self.items = None if items is None else {image_file(item[image_key]): item for item in items}
        self.names = case_names(self.items or ()) if names is None else dict(names)

    def attach(self, engine: Engine) -> None:
        """Register the handler with an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def iteration_completed(self, engine: Engine) -> None:
        """Call `case_completed` for each case of the iteration."""
        for item in items_of(engine):
            file = image_file_of(item, self.image_key, self.pred_key, self.label_key)
            try:
                self.case_completed(item, file)
            except Exception as error:
                if self.failures is None:
                    raise
                self.failures.add(file, self.product, error)

    @abstractmethod
    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Write the result of one case.

        Args:
            item: the evaluator's data of the case.
            file: its image file.
        """

    def name_of(self, file: str) -> str:
        """Return the case's name, which is unique among ``items``."""
        return self.names.get(file, case_name(file))

    def label_map(self, item: Mapping[str, Any], key: str, file: str) -> MetaTensor:
        """Return a label map of a case.

        Raises:
            InputError: the item has no such label map, or it is not a MetaTensor of shape (1, X, Y, Z).
        """
        advice = "check the evaluator's postprocessing, and the keys of its handlers"
        if key not in item:
            raise InputError(f"The case {file} has no label map '{key}', only {sorted(item)}: {advice}.")
        label_map = item[key]
        if not isinstance(label_map, MetaTensor) or label_map.ndim != 4 or len(label_map) != 1:
            found = f"{type(label_map).__name__} of shape {tuple(getattr(label_map, 'shape', ()))}"
            raise InputError(
                f"'{key}' of the case {file} must be a label map with its geometry, a MetaTensor of shape "
                f"(1, X, Y, Z), but is {found}: {advice}."
            )
        return label_map
