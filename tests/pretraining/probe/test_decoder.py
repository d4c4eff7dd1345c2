# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The decoder learns what is linearly there and nothing else, and is the minimum that it claims to be."""

from __future__ import annotations

import torch

from bundles.pretraining.probe.decoder import fit_decoder

EQUAL = torch.ones(3)


def clusters(per_class=200, spread=0.3):
    """Three classes in the first two of ten features; the others are noise."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(3).repeat_interleave(per_class)
    features = torch.randn(3 * per_class, 10, generator=generator)
    centres = torch.tensor([[0.0, 3.0], [3.0, 0.0], [-3.0, -3.0]])
    features[:, :2] = centres[classes] + spread * features[:, :2]
    return features, classes


def predict(decoder, features):
    return (features.double() @ decoder.weight.T + decoder.bias).argmax(dim=1)


def test_a_separable_problem_is_solved_and_a_random_one_is_not():
    features, classes = clusters()
    other, _ = clusters(spread=0.35)
    assert (predict(fit_decoder(features, classes, class_weights=EQUAL), other) == classes).all()
    generator = torch.Generator().manual_seed(1)
    shuffled = classes[torch.randperm(len(classes), generator=generator)]
    fresh = torch.randint(0, 3, (len(classes),), generator=generator)
    right = (predict(fit_decoder(features, shuffled, class_weights=EQUAL), features) == fresh).float().mean()
    assert 0.25 < right < 0.42  # chance is a third


def objective(weight, bias, standard, classes, decay):
    """Written out class by class: weighted means of the negative log-probability, and the penalty."""
    log = (standard @ weight.T + bias).log_softmax(dim=1)
    parts = [-log[classes == each, each].mean() for each in range(3)]
    return 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2] + decay / 2 * (weight**2).sum()


def test_the_result_is_the_minimum_of_its_objective():
    features, classes = clusters(spread=2.0)
    keep = torch.cat([torch.arange(200), torch.arange(200, 230), torch.arange(400, 410)])  # 200, 30 and 10 voxels
    features, classes = features[keep].double(), classes[keep]
    decoder = fit_decoder(features, classes, class_weights=torch.tensor([4, 2, 2]), decay=0.1)
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    weight = (decoder.weight * scale).requires_grad_()
    bias = (decoder.bias + decoder.weight @ mean).requires_grad_()
    value = objective(weight, bias, (features - mean) / scale, classes, 0.1)
    value.backward()
    assert weight.grad.abs().max() < 1e-5 and bias.grad.abs().max() < 1e-5
    assert float(weight.detach().abs().max()) > 0.1  # not the start


def test_units_and_offsets_of_features_do_not_matter():
    features, classes = clusters(spread=2.0)
    one = fit_decoder(features, classes, class_weights=EQUAL)
    changed = features.double() * torch.logspace(-3, 3, 10, dtype=torch.float64) + 50
    other = fit_decoder(changed, classes, class_weights=EQUAL)
    torch.testing.assert_close(
        changed @ other.weight.T + other.bias, features.double() @ one.weight.T + one.bias, rtol=1e-3, atol=1e-3
    )


def test_a_constant_feature_gets_no_weight():
    features, classes = clusters()
    features[:, 4] = 0.1  # not exact in float32
    features[:, 5] = 0.0
    decoder = fit_decoder(features, classes, class_weights=EQUAL)
    assert (decoder.weight[:, 4:6] == 0).all() and decoder.weight.isfinite().all()


def test_the_same_voxels_give_the_same_decoder_and_no_random_number_is_drawn():
    features, classes = clusters()
    state = torch.get_rng_state()
    with torch.no_grad():
        one, other = (fit_decoder(features, classes, class_weights=EQUAL) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
    assert torch.equal(state, torch.get_rng_state())
