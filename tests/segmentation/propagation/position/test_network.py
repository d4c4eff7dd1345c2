# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The position network is the pre-trained one, with its preprocessing; other files are refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bundles.common.errors import InputError, RefusedScan
from bundles.common.networks.positions import UNIT
from bundles.common.scans.reading import Volume
from bundles.pretraining.network import SwinPretrainer
from bundles.segmentation.propagation.position.network import PositionNetwork

from ....conftest import TINY_ENCODER

ENCODER = TINY_ENCODER | {"depths": [2, 2, 2, 2]}
TRAINED = {"roi_size": [64, 64, 32], "hu_window": [-1000.0, 1000.0], "foreground_hu": -500.0, "spacing": None}


def saved(path, *, tasks=("position",), trained=TRAINED, leave_out=()):
    """A network as a pre-training writes it."""
    torch.manual_seed(0)
    network = SwinPretrainer(encoder=ENCODER, tasks=tasks)
    state = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if name.startswith(("swinViT.", "encoder", "decoder", "position_head."))
        and not name.startswith(tuple(leave_out))
    }
    torch.save({"state_dict": state, "encoder": ENCODER, "trained": dict(trained)}, path)
    return network.eval()


def scan(shape=(64, 64, 32)):
    voxels = np.full(shape, -1000, np.int16)
    voxels[4:-4, 4:-4, :] = np.random.default_rng(0).integers(-100, 300, (shape[0] - 8, shape[1] - 8, shape[2]))
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-10, 20, 300)
    return Volume(voxels, affine)


def test_positions_are_those_of_the_pre_trained_network(tmp_path):
    network = saved(tmp_path / "network.pt")
    located = PositionNetwork(str(tmp_path / "network.pt"))
    true, predicted = located.body_positions(scan())
    # The scan is cut to the body, 56 x 56 x 32 voxels, and padded with air to the window.
    crop = torch.zeros(1, 1, 64, 64, 32)
    crop[0, 0, 4:60, 4:60] = torch.from_numpy((scan().voxels[4:60, 4:60].astype(np.float32) + 1000) / 2000)
    with torch.no_grad():
        expected = network.predict_positions(crop)[0, :, 4:60, 4:60].reshape(3, -1).T.double().numpy()
    step = -(-len(expected) // 50_000)
    assert np.allclose(predicted, expected[::step], atol=1e-2 * UNIT / 100)
    first = scan().affine @ [4, 4, 0, 1]
    assert np.allclose(true[0], first[:3]) and len(true) == len(expected[::step])


def test_a_scan_in_another_orientation_has_the_same_positions(tmp_path):
    saved(tmp_path / "network.pt")
    network = PositionNetwork(str(tmp_path / "network.pt"))
    original = scan()
    flipped = original.affine.copy()
    flipped[:3, 3] += flipped[:3, 0] * (original.voxels.shape[0] - 1)
    flipped[:3, 0] *= -1
    one, other = network.locate(original), network.locate(Volume(original.voxels[::-1], flipped))
    assert one == other


def test_too_little_body_is_refused(tmp_path):
    saved(tmp_path / "network.pt")
    network = PositionNetwork(str(tmp_path / "network.pt"))
    air = Volume(np.full((64, 64, 32), -1000, np.int16), np.eye(4))
    air.voxels[:5, :5, :5] = 0
    with pytest.raises(RefusedScan, match="125 voxels of body"):
        network.locate(air)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": ["position_head"]}, r"no head for positions.*--pretrain_scans"),
        ({"leave_out": ["decoder3"]}, "tensors missing.*decoder3"),
        ({"trained": {"roi_size": [64, 64, 32]}}, "does not record the hu_window, foreground_hu, spacing"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    saved(tmp_path / "network.pt", **changes)
    with pytest.raises(InputError, match=message):
        PositionNetwork(str(tmp_path / "network.pt"))


def test_a_network_of_several_channels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODER, "in_channels", 2)
    saved(tmp_path / "network.pt")
    with pytest.raises(InputError, match="takes 2 channels"):
        PositionNetwork(str(tmp_path / "network.pt"))
