# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A picture of the first validation case, after each validation: what the network sees, predicts and should predict."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ignite.engine import Engine, Events
from monai.utils import convert_to_numpy

from ...common.data.case_names import case_name, image_file_of
from ...common.files import save_figure
from ...common.run.distributed import rank
from ..models.label_names import organ_names
from ..results.overlay import overlay_figure


class ValidationPicture:
    """Handler for `SupervisedEvaluator`: draws the first case of each validation on the preprocessed grid, on rank 0.

    ``pred`` and ``label`` of its output are label maps (1, X, Y, Z) in RAS orientation.

    Args:
        labels: organ name of each label value.
        path: the PNG file, replaced at each validation.
        window: intensities shown as black and white; see `overlay_figure`.
    """

    def __init__(
        self, *, labels: Mapping[int | str, str], path: str | os.PathLike, window: tuple[float, float] | None
    ) -> None:
        self.labels = organ_names(labels)
        self.path = path
        self.window = window

    def attach(self, engine: Engine) -> None:
        """Draw after the first iteration of an epoch."""
        if rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if (engine.state.iteration - 1) % engine.state.epoch_length:
            return
        item = engine.state.output[0]
        image = item["image"]
        figure = overlay_figure(
            convert_to_numpy(image[0]),
            convert_to_numpy(item["pred"][0]),
            truth=convert_to_numpy(item["label"][0]),
            spacing=image.pixdim.tolist(),
            labels=self.labels,
            window=self.window,
            title=f"validation case {case_name(image_file_of(item, 'image'))}",
        )
        save_figure(figure, self.path)
