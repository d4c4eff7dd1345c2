# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Inspect a pre-trained network: reconstruct a masked scan window by window, and compute its embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.inferers import SlidingWindowInferer

from ...common.cases.case_handler import CaseHandler
from ...common.errors import InputError
from ...common.files import atomic_path, save_figure
from ...common.run.distributed import unwrap
from ..proxy_tasks.augmented_views import AugmentedViews
from ..proxy_tasks.draws import generator


def check_inpainting(*, tasks: Sequence[str], file: str) -> None:
    """Check that the network can restore what is masked.

    Raises:
        InputError: it was trained without inpainting.
    """
    if "inpainting" not in tasks:
        raise InputError(
            f"{file} was trained on {', '.join(tasks)}, without inpainting: there is nothing to reconstruct."
        )


class MaskedWindows(SlidingWindowInferer):
    """Sliding window inferer that masks every window as in training.

    It returns the reconstruction, the masked scan and the embeddings of the windows. Windows do not overlap, because
    the next window would show voxels that one hides. The scan is padded with zeros to whole windows.

    Args:
        roi_size: window size, equal to the ROI of the training.
        sw_batch_size: windows per forward pass.
        views: draws and applies the masks; batch ``i`` of windows of a scan is masked by draw ``i``.

    Raises:
        InputError: ``views`` fill masks with voxels of another crop.
    """

    def __init__(self, *, roi_size: list[int], sw_batch_size: int, views: AugmentedViews) -> None:
        if "sample" in views.mask_fill:
            raise InputError(
                f"--mask_fill {list(views.mask_fill)}: 'sample' takes voxels of another crop, which a window has none of. Use "
                "'noise' or 'zero'."
            )
        super().__init__(roi_size=roi_size, sw_batch_size=sw_batch_size, overlap=0.0, mode="constant")
        self.views = views

    def __call__(
        self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Return ``reconstruction`` and ``masked`` (1, C, X, Y, Z), and ``embedding`` (1, windows, features)."""
        embeddings: list[torch.Tensor] = []

        def predict(windows: torch.Tensor) -> dict[str, torch.Tensor]:
            masked, _ = self.views.mask(windows, [generator(self.views.seed, len(embeddings), windows.device)])
            embeddings.append(unwrap(network).embedding(windows).float().cpu())
            return {"reconstruction": network(masked), "masked": masked}

        shape = inputs.shape[2:]
        missing = [-size % roi for size, roi in zip(shape, self.roi_size, strict=True)]
        padded = torch.nn.functional.pad(inputs, [amount for after in reversed(missing) for amount in (0, after)])
        outputs = super().__call__(padded, predict)
        outputs = {name: volume[:, :, : shape[0], : shape[1], : shape[2]] for name, volume in outputs.items()}
        return {**outputs, "embedding": torch.cat(embeddings)[None]}


class SaveEmbeddings(CaseHandler):
    """Handler of an evaluator: writes the embedding of each scan to ``<scan>_embedding.npz``.

    The file has ``windows`` (windows, features), in the order of the sliding window, and their mean ``embedding``
    (features,).

    Args:
        output_dir: output folder.
        options: ``names`` and ``failures`` of `CaseHandler`.
    """

    product = "embedding"

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Write one scan."""
        windows = item["embedding"].numpy()
        path = self.output_dir / f"{self.name_of(file)}_embedding.npz"
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, embedding=windows.mean(axis=0), windows=windows)


class SaveReconstructionPictures(CaseHandler):
    """Handler of an evaluator: draws scan, masked scan and reconstruction in three planes.

    Writes ``<scan>_reconstruction.png``.

    Args:
        output_dir: output folder.
        hu_window: (low, high) of the grey scale in HU.
        options: ``names`` and ``failures`` of `CaseHandler`.
    """

    product = "picture"

    def __init__(self, output_dir: str | Path, *, hu_window: Sequence[float], **options: Any) -> None:
        super().__init__(output_dir, **options)
        self.hu_window = hu_window

    def case_completed(self, item: Mapping[str, Any], file: str) -> None:
        """Draw one scan."""
        figure = Figure(figsize=(9, 9), layout="constrained")
        low, up = self.hu_window
        for row, key in enumerate(("scan", "masked", "reconstruction")):
            volume, spacing = item[key], item[key].pixdim.tolist()
            for column, plane in enumerate(("x", "y", "z")):
                picture = volume[0].select(column, volume.shape[column + 1] // 2).cpu().numpy().T
                wide, high = (spacing[axis] for axis in range(3) if axis != column)
                axes = figure.add_subplot(3, 3, 3 * row + column + 1)
                axes.imshow(picture, cmap="gray", origin="lower", vmin=low, vmax=up, aspect=high / wide)
                axes.set(xticks=[], yticks=[], frame_on=False)
                axes.set_title(f"{key}, middle of {plane}", fontsize=9)
        save_figure(figure, self.output_dir / f"{self.name_of(file)}_reconstruction.png")
