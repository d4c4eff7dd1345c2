# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The network that knows where in the body each voxel is, and what it says about whole scans.

It is pre-trained by swin_unetr_pretrain with the task ``position``, without labels; its ``network.pt`` holds a whole
Swin UNETR and the head for positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForeground, ScaleIntensityRange, Spacing

from ....common.data.foreground import above_or_all
from ....common.errors import InputError, RefusedScan
from ....common.networks.positions import UNIT, position_map, positions
from ....common.networks.swin_unetr import build_swin_unetr
from ....common.scans.reading import Volume
from ....common.weights.checkpoint_file import release_checkpoint
from ....common.weights.dialects import find_weights
from ....common.weights.encoder_record import read_record
from ....common.weights.loading import decoder_state, load_exactly
from .fit import PositionFit, Profile, fit_positions, profiles_of

HEAD = "position_head."  # in the file
OUTPUT = "out."  # the last layer of Swin UNETR
RECORDED = ("roi_size", "hu_window", "foreground_hu", "spacing")
LEAST_BODY = 1000  # voxels of the network's grid
MOST_VOXELS = 50_000  # voxels of the body that are fitted; more change no digit that counts


@dataclass(frozen=True)
class ScanPosition:
    """Where a scan is in the average body.

    Attributes:
        fit: scale, shift and residual by axis.
        profiles: what the network says along each axis, see `profiles_of`.
    """

    fit: PositionFit
    profiles: tuple[Profile, Profile, Profile]


class PositionNetwork:
    """A position network and the preprocessing of its training.

    Args:
        path: ``network.pt`` or ``model.pt`` of a pre-training with the task position.
        device: where it runs.
        fast: same results with less time and memory; False: unmodified MONAI.
        sw_batch_size: windows per forward pass.

    Raises:
        InputError: the file cannot be read, has no head for positions, or does not record its preprocessing.
    """

    def __init__(
        self, path: str, *, device: torch.device | str = "cpu", fast: bool = True, sw_batch_size: int = 4
    ) -> None:
        found = find_weights(path)
        head = {name: tensor for name, tensor in found.rest.items() if name.startswith(HEAD)}
        if not head:
            raise InputError(
                f"{path} has no head for positions ({HEAD}*): it was not pre-trained with the task position. Use the "
                "network.pt of a pre-training with --tasks \"['position']\", or --pretrain_scans to train one."
            )
        trained: Mapping[str, Any] = found.content.get("trained") or {}
        if absent := [name for name in RECORDED if name not in trained]:
            raise InputError(
                f"{path} does not record the {', '.join(absent)} of its training: use a file that swin_unetr_pretrain "
                "wrote."
            )
        record = read_record(path)
        if record["in_channels"] != 1:
            raise InputError(f"{path} takes {record['in_channels']} channels: a position network takes CT, 1 channel.")
        self.path, self.device, self.sw_batch_size = path, torch.device(device), sw_batch_size
        self.roi_size: Sequence[int] = list(trained["roi_size"])
        self.spacing: Sequence[float] | None = trained["spacing"]
        low, high = trained["hu_window"]
        self.body_above = (trained["foreground_hu"] - low) / (high - low)
        network = build_swin_unetr(record, out_channels=3, fast=fast)
        state = found.encoder | {name: found.rest[name] for name in decoder_state(network) if name in found.rest}
        state |= {OUTPUT + name.removeprefix(HEAD): tensor for name, tensor in head.items()}
        load_exactly(network, state, set(network.state_dict()), path)
        release_checkpoint(path)
        self.network = network.to(self.device).eval()
        # As in swin_unetr_pretrain's train.yaml; the scan is already in RAS.
        self.preprocessing = Compose(
            [
                *([] if self.spacing is None else [Spacing(pixdim=self.spacing, mode="bilinear")]),
                CropForeground(select_fn=partial(above_or_all, other=trained["foreground_hu"]), allow_smaller=True),
                ScaleIntensityRange(a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
            ]
        )

    def body_positions(self, scan: Volume) -> tuple[np.ndarray, np.ndarray]:
        """Return true and predicted position of voxels of the body, (N, 3) each, in mm in RAS.

        Raises:
            RefusedScan: the scan has too little body.
        """
        scan = scan.to_ras()
        voxels = torch.from_numpy(np.ascontiguousarray(scan.voxels[None], dtype=np.float32))
        image = self.preprocessing(MetaTensor(voxels, affine=torch.from_numpy(scan.affine)))
        body = torch.nonzero(image.as_tensor()[0] > self.body_above)
        if len(body) < LEAST_BODY:
            raise RefusedScan(f"has {len(body)} voxels of body, and {LEAST_BODY} are needed")
        predicted = position_map(
            lambda windows: UNIT * self.network(windows).float(),
            image.as_tensor(),
            roi_size=self.roi_size,
            sw_batch_size=self.sw_batch_size,
            device=self.device,
        ).cpu()
        true = positions(image.affine[None], image.shape[1:])[0]
        body = body[:: -(-len(body) // MOST_VOXELS)]
        return tuple(values[(slice(None), *body.T)].T.double().numpy() for values in (true, predicted))

    def locate(self, scan: Volume) -> ScanPosition:
        """Return where a scan is in the average body.

        Raises:
            RefusedScan: the scan has too little body.
        """
        true, predicted = self.body_positions(scan)
        return ScanPosition(fit_positions(true, predicted), profiles_of(true, predicted))
