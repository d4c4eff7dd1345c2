# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Dice of a linear decoder on frozen features: what the features hold for segmentation, in seconds.

Why linear: a linear classifier on frozen features (a linear probe: Alain & Bengio, arXiv 1610.01644) learns nothing by
itself that is not in the features, its fit is a convex problem without a learning rate or a draw, and it is cheap. So a
change of its Dice is a change of the features. For dense tasks it reads the features of each place, as in the linear
segmentation of DINOv2 (arXiv 2304.07193); here of all resolutions.

What it cannot show: the Dice after fine-tuning. Fine-tuning changes the features and has a decoder with convolutions,
and the two orders of encoders need not agree (masked autoencoders, arXiv 2111.06377, section 4.3: linear probing and
fine-tuning are largely uncorrelated). An untrained encoder is not a low bar: its random features hold local texture at
five scales. A few scans give a Dice that is good for comparing steps of one run on the same scans, and for nothing
else. A class that a scan lacks is not scored there, so false positives in such scans do not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from monai.metrics import DiceMetric
from monai.transforms import Compose

from ...common.errors import InputError
from ...common.run.distributed import gather_lists, rank, world_size
from .decoder import LinearDecoder, fit_decoder
from .features import at_voxels, linear_map
from .labelled_scans import UNKNOWN, LabelledScan, class_counts, load_labelled_scan, sample_voxels
from .windows import owners, padded, windows_of

logger = logging.getLogger(__name__)

#: Background voxels per voxel of another class: the rest of the body is more varied than an organ.
#: On OpenKBP (seven small organs, an untrained encoder) the Dice was 0.19 with 1, 0.29 with 20.
BACKGROUND = 10

#: Maps windows (B, C, X, Y, Z) to features, tensors (B, C', X', Y', Z') of any resolution.
Extract = Callable[[torch.Tensor], list[torch.Tensor]]


class Probe:
    """Labelled scans in memory, and the measurement of any features of them.

    The scans are read once and shared among the ranks. What is measured depends only on the features: voxels, windows
    and decoder are the same every time and for any number of processes, and no global random generator is used.

    Args:
        training: items ``{"image", "label"}`` to fit the decoder to.
        validation: items to score it on.
        classes: label value to name, the background 0 first.
        preprocessing: that of the pre-training, with the key ``image``.
        roi_size: size of a window in voxels.
        batch_size: windows per forward pass.
        voxels: largest number of training voxels per class, over all scans; `BACKGROUND` times as many of the
            background.
        seed: seed of the draw of these voxels.
        device: where the features are computed.
        ignore_label: label value of unknown voxels, which are in no sample and in no score; None: there are none.

    Raises:
        InputError: a class is in no training scan, or only the background is in the validation scans.
    """

    def __init__(
        self,
        *,
        training: Sequence[dict],
        validation: Sequence[dict],
        classes: Mapping[int, str],
        preprocessing: Compose,
        roi_size: Sequence[int],
        batch_size: int,
        voxels: int,
        seed: int,
        device: torch.device | str,
        ignore_label: int | None = None,
    ) -> None:
        self.names = list(classes.values())
        self.roi_size = tuple(roi_size)
        self.batch_size = batch_size
        self.device = device
        self.dice = DiceMetric(include_background=False, num_classes=len(classes), reduction="none")
        own = {
            section: {
                number: load_labelled_scan(
                    items[number], preprocessing=preprocessing, values=list(classes), ignore_label=ignore_label
                )
                for number in range(rank(), len(items), world_size())
            }
            for section, items in (("training", training), ("validation", validation))
        }
        counts = {section: self._counts(scans) for section, scans in own.items()}
        self._check_presence(counts)
        self.measured = [each for each in range(1, len(self.names)) if counts["validation"][:, each].any()]
        carriers = (counts["training"] > 0).sum(axis=0)
        total = np.full(len(self.names), voxels)
        total[0] *= BACKGROUND
        wanted = -(-total // carriers)  # voxels of each scan that has the class
        # The square root, as in the sampling of Mahajan et al., arXiv 1805.00932: with equal weights small organs are
        # found in too many places, with their share of the volume in none. On OpenKBP the powers 0.25, 0.5 and 0.75
        # gave 0.23, 0.29 and 0.27 before and 0.18, 0.22 and 0.26 after a pre-training of 300 steps.
        self.class_weights = torch.from_numpy(counts["training"].sum(axis=0)).sqrt()
        self.validation = own["validation"]
        self.training = {
            number: (scan, *sample_voxels(scan, wanted=wanted, seed=[seed, number]))
            for number, scan in own["training"].items()
        }

    def _counts(self, own: Mapping[int, LabelledScan]) -> np.ndarray:
        """Return the voxels of each class in each scan of all ranks, (scans, classes)."""
        rows = gather_lists([(number, class_counts(scan, len(self.names))) for number, scan in own.items()])
        return np.stack([row for _, row in sorted(rows, key=lambda each: each[0])])

    def _check_presence(self, counts: Mapping[str, np.ndarray]) -> None:
        absent = {
            section: [name for name, number in zip(self.names, table.sum(axis=0), strict=True) if not number]
            for section, table in counts.items()
        }
        if absent["training"]:
            raise InputError(
                f"--probe_list: none of its {len(counts['training'])} training scans has a voxel of "
                f"{', '.join(absent['training'])} (at the spacing of this run), so the probe cannot learn it. Add a "
                "scan that has it to 'training', or move one there; if no scan has it, remove it from 'labels'."
            )
        if len(set(absent["validation"]) - {self.names[0]}) == len(self.names) - 1:
            raise InputError(
                f"--probe_list: its {len(counts['validation'])} validation scans hold nothing but "
                f"{self.names[0]}, so there is nothing to score. Add scans with {', '.join(self.names[1:])}."
            )
        if absent["validation"] and rank() == 0:
            logger.warning(
                "--probe_list: no validation scan has %s; it is left out of the Dice", ", ".join(absent["validation"])
            )

    def measure(self, extract: Extract) -> dict[str, float]:
        """Fit the decoder to features of the training scans and score it on the validation scans.

        Returns:
            ``probe_dice``, the mean over the classes besides the background, and ``probe_dice_CLASS`` of each: the mean
            over the validation scans that have the class. Equal on all ranks.
        """
        parts = gather_lists(
            [
                (number, self._sampled(scan, voxels, extract), kind)
                for number, (scan, voxels, kind) in self.training.items()
            ]
        )
        parts.sort(key=lambda each: each[0])
        decoders = []
        if rank() == 0:  # one rank, so that all have exactly the same
            features, kinds = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
            decoders = [fit_decoder(features, kinds, class_weights=self.class_weights)]
        (decoder,) = gather_lists(decoders)
        scores = gather_lists([(n, self._dice(scan, decoder, extract)) for n, scan in self.validation.items()])
        table = np.array([row for _, row in sorted(scores, key=lambda each: each[0])])  # (scans, classes - 1)
        dice = {self.names[each]: float(np.nanmean(table[:, each - 1])) for each in self.measured}
        return {"probe_dice": float(np.mean(list(dice.values())))} | {f"probe_dice_{k}": v for k, v in dice.items()}

    def _batches(self, scan: LabelledScan, extract: Extract):
        """Yield the windows of a scan, a batch at a time, with their features."""
        image = padded(scan.image, self.roi_size)
        windows = windows_of(image.shape[1:], self.roi_size)
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            with torch.no_grad():
                yield (
                    start,
                    batch,
                    extract(torch.stack([image[(slice(None), *each)] for each in batch]).to(self.device)),
                )

    def _sampled(self, scan: LabelledScan, voxels: torch.Tensor, extract: Extract) -> torch.Tensor:
        """Return the features of some voxels of a scan, float32 (N, F)."""
        owner = owners(voxels, windows_of(padded(scan.image, self.roi_size).shape[1:], self.roi_size))
        result = None
        for start, batch, features in self._batches(scan, extract):
            for place, window in enumerate(batch):
                own = torch.nonzero(owner == start + place).flatten()
                inside = voxels[own] - torch.tensor([part.start for part in window])
                values = at_voxels([feature[place] for feature in features], inside, self.roi_size).cpu()
                if result is None:
                    result = torch.empty(len(voxels), values.shape[1])
                result[own] = values
        return result

    def _dice(self, scan: LabelledScan, decoder: LinearDecoder, extract: Extract) -> list[float]:
        """Return the Dice of each class besides the background in a whole scan; NaN for a class that it lacks."""
        whole = padded(scan.classes[None], self.roi_size)
        predicted = torch.zeros_like(whole)
        for _, batch, features in self._batches(scan, extract):
            classes = linear_map(features, decoder.weight, decoder.bias, self.roi_size).argmax(dim=1)
            for window, values in zip(batch, classes.cpu(), strict=True):
                predicted[(0, *window)] = values.to(predicted.dtype)
        x, y, z = scan.classes.shape
        predicted[:, :x, :y, :z][scan.classes[None] == UNKNOWN] = UNKNOWN
        return self.dice(predicted[None, :, :x, :y, :z], scan.classes[None, None])[0].tolist()
