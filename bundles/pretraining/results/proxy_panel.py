# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Draw one picture per proxy task: input, prediction and target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...common.files import save_figure
from ...common.run.distributed import rank

ANGLES = ("0°", "90°", "180°", "270°")


def _middle(volume: torch.Tensor) -> Any:
    """Return the middle axial slice of (C, X, Y, Z), first channel, anterior at the top."""
    return volume[0, :, :, volume.shape[-1] // 2].float().cpu().numpy().T


def _show(axes: Axes, volume: torch.Tensor) -> None:
    """Show the `_middle` of a volume without a frame."""
    axes.imshow(_middle(volume), cmap="gray", origin="lower", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], frame_on=False)  # without `set_axis_off`, under which ticks are still measured


def inpainting_figure(
    target: torch.Tensor, view: torch.Tensor, reconstruction: torch.Tensor, mask: torch.Tensor
) -> Figure:
    """Draw rows of crop, masked view, reconstruction, and the view whose masked voxels are those of the reconstruction.

    Args:
        target, view, reconstruction: (N, C, X, Y, Z) in [0, 1].
        mask: bool (N, 1, X, Y, Z).
    """
    figure = Figure(figsize=(8.8, 2.2 * len(target)), layout="constrained")
    columns = {
        "crop": target,
        "masked view": view,
        "restored": torch.where(mask, reconstruction.to(view.dtype), view),
        "whole reconstruction": reconstruction,
    }
    for row in range(len(target)):
        for column, (title, volumes) in enumerate(columns.items()):
            volume = volumes[row]
            axes = figure.add_subplot(len(target), len(columns), len(columns) * row + column + 1)
            _show(axes, volume)
            if row == 0:
                axes.set_title(title, fontsize=10)
    return figure


def rotation_figure(view: torch.Tensor, turns: torch.Tensor, logits: torch.Tensor) -> Figure:
    """Draw views with the true angle, the predicted angle and its probability."""
    figure = Figure(figsize=(2.0 * len(view), 2.5), layout="constrained")
    probability, predicted = logits.float().softmax(1).max(1)
    for column, volume in enumerate(view):
        axes = figure.add_subplot(1, len(view), column + 1)
        _show(axes, volume)
        right = bool(predicted[column] == turns[column])
        axes.set_title(
            f"true {ANGLES[turns[column]]}\npredicted {ANGLES[predicted[column]]} ({probability[column]:.0%})",
            fontsize=9,
            color="tab:green" if right else "tab:red",
        )
    return figure


def contrast_figure(first: torch.Tensor, second: torch.Tensor, embeddings: torch.Tensor) -> Figure:
    """Draw both views of each crop next to the cosine similarity of all embeddings (2N, D); partners are outlined."""
    number = len(first)
    figure = Figure(figsize=(1.6 * number + 4.2, 3.4), layout="constrained")
    grid = figure.add_gridspec(2, number + 2, width_ratios=[1] * number + [1.3, 1.3])
    for column in range(number):
        for row, volume in enumerate((first[column], second[column])):
            axes = figure.add_subplot(grid[row, column])
            _show(axes, volume)
            axes.set_title(f"{'AB'[row]}{column + 1}", fontsize=9)
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    similarity = (unit @ unit.T).cpu().numpy()
    axes = figure.add_subplot(grid[:, number:])
    image = axes.imshow(similarity, cmap="viridis", vmin=float(similarity.min()), vmax=1)
    names = [f"A{i + 1}" for i in range(number)] + [f"B{i + 1}" for i in range(number)]
    axes.set_xticks(range(2 * number), names, fontsize=7)
    axes.set_yticks(range(2 * number), names, fontsize=7)
    for row in range(2 * number):
        partner = (row + number) % (2 * number)
        axes.add_patch(Rectangle((partner - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=1.2))
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
    return figure


class ProxyPanels:
    """Handler for `SupervisedEvaluator`: draw the first batch of each validation, one picture per task.

    Writes ``panel_inpainting.png``, ``panel_contrast.png`` and ``panel_rotation.png``.

    Args:
        folder: output folder; each validation overwrites the previous pictures.
        crops: largest number of crops to show.
    """

    def __init__(self, *, folder: str, crops: int = 4) -> None:
        self.folder = Path(folder)
        self.crops = crops

    def attach(self, engine: Engine) -> None:
        """Register the handlers, on rank 0 only."""
        if rank() == 0:
            engine.add_event_handler(Events.EPOCH_STARTED, self.rearm)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.draw)
        self.drawn = False

    def rearm(self, engine: Engine) -> None:
        """Draw again in the new validation."""
        self.drawn = False

    def draw(self, engine: Engine) -> None:
        """Draw the first batch of this validation."""
        if self.drawn:
            return
        self.drawn = True
        views, outputs, targets = (engine.state.output[key] for key in ("image", "pred", "label"))
        if "crop" not in targets:  # no task reads masked views
            return
        views = views[: len(targets["crop"])]
        number = min(self.crops, len(views) // 2)
        figures = {}
        if "inpainting" in outputs:
            figures["inpainting"] = inpainting_figure(
                targets["crop"][:number], views[:number], outputs["inpainting"][:number], targets["mask"][:number]
            )
        if "rotation" in outputs:
            figures["rotation"] = rotation_figure(
                views[: 2 * number], targets["turns"].tolist()[: 2 * number], outputs["rotation"][: 2 * number]
            )
        if "contrast" in outputs:
            first, second = (half[:number] for half in outputs["contrast"].chunk(2))
            first_views, second_views = (half[:number] for half in views.chunk(2))
            figures["contrast"] = contrast_figure(first_views, second_views, torch.cat([first, second]))
        for task, figure in figures.items():
            save_figure(figure, self.folder / f"panel_{task}.png")
