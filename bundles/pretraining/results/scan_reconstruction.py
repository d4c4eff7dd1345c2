# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Look at what was learnt: reconstruct a masked scan window by window, and embed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.inferers import SlidingWindowInferer

from ...common.data.case_names import case_name, image_file_of
from ...common.files import atomic_path
from ...common.run.distributed import unwrap
from ..proxy_tasks.augmented_views import TwoViews


class MaskedWindows(SlidingWindowInferer):
    """Masks every window as in training and returns the network's reconstruction, the masked scan and the windows' embeddings.

    Windows do not overlap, for a voxel that one window hides would be seen by the next: the scan is padded with zeros to
    whole windows.

    Args:
        roi_size: window, the ROI of the training.
        sw_batch_size: windows per forward.
        views: draws and applies the masks; window batch ``i`` of a scan is masked by draw ``i``.
    """

    def __init__(self, *, roi_size: list[int], sw_batch_size: int, views: TwoViews) -> None:
        super().__init__(roi_size=roi_size, sw_batch_size=sw_batch_size, overlap=0.0, mode="constant")
        self.views = views

    def __call__(
        self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Scan (1, C, X, Y, Z) to ``reconstruction`` and ``masked`` of the same shape and ``embedding`` (windows, features)."""
        embeddings: list[torch.Tensor] = []

        def predict(windows: torch.Tensor) -> dict[str, torch.Tensor]:
            generator = self.views.generator(len(embeddings), windows.device)
            masked, _ = self.views.mask(windows, generator)
            embeddings.append(unwrap(network).embedding(windows).float().cpu())
            return {"reconstruction": network(masked), "masked": masked}

        shape = inputs.shape[2:]
        short = [-size % roi for size, roi in zip(shape, self.roi_size, strict=True)]
        padded = torch.nn.functional.pad(inputs, [amount for after in reversed(short) for amount in (0, after)])
        outputs = super().__call__(padded, predict)
        outputs = {name: volume[:, :, : shape[0], : shape[1], : shape[2]] for name, volume in outputs.items()}
        return {**outputs, "embedding": torch.cat(embeddings)[None]}


class SaveEmbeddings:
    """Handler for `SupervisedEvaluator`: writes ``<scan>_embedding.npz`` with ``embedding`` (features,) and ``windows`` (windows, features).

    The embedding of a scan is the mean over its windows, in the order in which the sliding window visits them.

    Args:
        folder: where the files go.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    def attach(self, engine: Engine) -> None:
        """Write after each scan."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item in engine.state.output:
            name = case_name(image_file_of(item, "image"))
            windows = item["embedding"].numpy()
            with atomic_path(self.folder / f"{name}_embedding.npz") as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, embedding=windows.mean(axis=0), windows=windows)


class SaveReconstructionPictures:
    """Handler for `SupervisedEvaluator`: ``<scan>_reconstruction.png`` with the scan, the masked scan and the reconstruction in three planes.

    Args:
        folder: where the pictures go.
        hu_window: (low, high) of the grey scale in HU.
    """

    def __init__(self, *, folder: str, hu_window: list[float]) -> None:
        self.folder = Path(folder)
        self.hu_window = hu_window

    def attach(self, engine: Engine) -> None:
        """Draw after each scan."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item in engine.state.output:
            figure = Figure(figsize=(9, 9), layout="constrained")
            for row, key in enumerate(("scan", "masked", "reconstruction")):
                volume, spacing = item[key], item[key].pixdim.tolist()
                for column, plane in enumerate(("x", "y", "z")):
                    picture = volume[0].select(column, volume.shape[column + 1] // 2).cpu().numpy().T
                    wide, high = (spacing[axis] for axis in range(3) if axis != column)
                    axes = figure.add_subplot(3, 3, 3 * row + column + 1)
                    low, up = self.hu_window
                    axes.imshow(picture, cmap="gray", origin="lower", vmin=low, vmax=up, aspect=high / wide)
                    axes.set_axis_off()
                    axes.set_title(f"{key}, middle of {plane}", fontsize=9)
            with atomic_path(
                self.folder / f"{case_name(image_file_of(item, 'image'))}_reconstruction.png"
            ) as temporary:
                figure.savefig(temporary, dpi=100)
