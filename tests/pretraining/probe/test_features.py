# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Features at voxels are those of a dense interpolation, and the short way to the scores gives the same scores."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bundles.pretraining.network import SwinPretrainer
from bundles.pretraining.probe.features import at_voxels, frozen_features, intensities, linear_map
from bundles.pretraining.proxy_tasks.tasks import PAPER_TASKS as TASKS

SIZE = (8, 4, 16)


def levels(batch=1):
    """One tensor per resolution, each with its own number of channels."""
    torch.manual_seed(0)
    return [torch.randn(batch, c, *(side // step for side in SIZE)) for c, step in ((1, 1), (3, 2), (2, 4))]


def every_voxel():
    return torch.cartesian_prod(*(torch.arange(side) for side in SIZE))


def test_a_coarse_voxel_is_interpolated_between_centres_by_hand():
    """Two values over four voxels: the centres of the coarse ones are at 0.5 and 2.5; beyond them nothing changes."""
    feature = torch.tensor([10.0, 20.0]).reshape(1, 1, 1, 2)  # along z
    voxels = torch.tensor([[0, 0, z] for z in range(4)])
    values = at_voxels([feature], voxels, (1, 1, 4))
    torch.testing.assert_close(values, torch.tensor([[10.0], [12.5], [17.5], [20.0]]))


def test_axes_are_not_exchanged():
    feature = torch.arange(8.0 * 4 * 16).reshape(1, *SIZE)
    voxels = torch.tensor([[7, 0, 0], [0, 3, 0], [0, 0, 15], [2, 1, 5]])
    expected = torch.tensor([[7.0 * 64], [3.0 * 16], [15.0], [2 * 64 + 16 + 5.0]])
    torch.testing.assert_close(at_voxels([feature], voxels, SIZE), expected)


def test_features_at_all_voxels_are_the_dense_interpolation_of_each_level():
    features = levels()
    dense = [F.interpolate(each, size=SIZE, mode="trilinear", align_corners=False) for each in features]
    expected = torch.cat(dense, dim=1)[0].flatten(1).T
    assert expected.shape == (8 * 4 * 16, 6)
    torch.testing.assert_close(
        at_voxels([each[0] for each in features], every_voxel(), SIZE), expected, rtol=1e-4, atol=1e-5
    )


def test_mapping_before_interpolation_gives_the_scores_of_hypercolumns():
    features = levels(batch=2)
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    scores = linear_map(features, weight, bias, SIZE)
    assert scores.shape == (2, 5, *SIZE)
    for place in (0, 1):
        columns = at_voxels([each[place] for each in features], every_voxel(), SIZE).double()
        expected = (columns @ weight.T + bias).T.reshape(5, *SIZE)
        torch.testing.assert_close(scores[place].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_frozen_features_are_intensities_and_five_hidden_states(record, fast):
    torch.manual_seed(0)
    network = SwinPretrainer(encoder=record, tasks=TASKS, fast=fast).train()
    windows = torch.rand(2, 1, 64, 64, 32)
    features = frozen_features(network, windows)
    assert features[0] is windows and intensities(windows) == [windows]
    shapes = [(2, 12 * 2**i, 64 >> i + 1, 64 >> i + 1, 32 >> i + 1) for i in range(5)]
    assert [tuple(each.shape) for each in features[1:]] == shapes
    assert not any(each.requires_grad for each in features)
    torch.testing.assert_close(features[5], network.eval().bottleneck(windows))


def test_a_whole_network_adds_the_features_of_its_decoder(record):
    heads = {"reconstruction_head": "unet", "pooling": "mean"}
    network = SwinPretrainer(encoder=record, tasks=["position"], heads=heads).eval()
    windows = torch.rand(1, 1, 64, 64, 32)
    features = frozen_features(network, windows)
    assert len(features) == 7 and features[-1].shape == (1, 12, 64, 64, 32)
    torch.testing.assert_close(100 * network.position_head(features[-1]), network.predict_positions(windows))


def test_a_network_in_training_is_probed_in_eval_mode_and_goes_on_training():
    class Remember(torch.nn.Module):
        def features(self, x):
            self.seen = (self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
            return [torch.nn.functional.conv3d(x, torch.ones(1, 1, 1, 1, 1))]

    network = Remember().train()
    features = frozen_features(network, torch.ones(1, 1, 2, 2, 2), amp=True, amp_kwargs={"dtype": torch.bfloat16})
    assert network.seen == (False, False, True)
    assert network.training and torch.is_grad_enabled()
    assert features[1].dtype == torch.float32
