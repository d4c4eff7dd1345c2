# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Crops hold body where there is some, small volumes are padded, and both are counted and said."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from bundles.pretraining.crops.body_crops import CropCounts, RandBodyCropsd


def volume(shape=(40, 40, 40), body=slice(30, 40)):
    """Air with a block of body in one corner: 1/64 of the volume."""
    image = torch.zeros(1, *shape)
    image[:, body, body, body] = 0.6
    return {"image": MetaTensor(image), "name": "scan"}


def crops(data, *, seed=0, number=50, roi_size=(10, 10, 10), **options):
    transform = RandBodyCropsd(
        "image", roi_size=roi_size, num_samples=number, **{"threshold": 0.25, "min_body": 0.05, **options}
    )
    return transform.set_random_state(seed=seed)(data)


def body(crop):
    return float((crop["image"] > 0.25).float().mean())


def test_crops_of_air_are_drawn_anew_and_counted():
    drawn = crops(volume(), tries=10_000)
    assert len(drawn) == 50 and all(crop["image"].shape == (1, 10, 10, 10) for crop in drawn)
    assert all(body(crop) >= 0.05 and crop["airy"] == 0 for crop in drawn)
    # a crop starts uniformly at 0..30 on each axis: count those with 50 voxels of body
    starts = np.arange(31)
    overlap = np.clip(starts + 10 - 30, 0, 10)
    wanted = (overlap[:, None, None] * overlap[None, :, None] * overlap[None, None, :] >= 50).mean()
    redrawn = np.mean([crop["redrawn"] for crop in drawn])
    assert redrawn == pytest.approx(1 / wanted - 1, rel=0.5)


def test_nothing_is_drawn_anew_where_all_is_body():
    data = {"image": MetaTensor(torch.rand(1, 20, 20, 20) + 0.3)}
    drawn = crops(data)
    assert all(crop["redrawn"] == crop["airy"] == crop["padded"] == 0 for crop in drawn)
    assert len({float(crop["image"][0, 0, 0, 0]) for crop in drawn}) > 30  # at many places


def test_a_scan_of_air_is_kept_after_all_tries_and_says_so():
    drawn = crops({"image": MetaTensor(torch.zeros(1, 20, 20, 20))}, number=2, tries=7)
    assert [(crop["airy"], crop["redrawn"]) for crop in drawn] == [(1, 6), (1, 6)]


def test_the_seed_fixes_the_crops():
    one, same, other = crops(volume(), seed=3), crops(volume(), seed=3), crops(volume(), seed=4)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def test_a_small_volume_is_padded_with_air_around_its_middle():
    data = {"image": MetaTensor(torch.ones(1, 10, 10, 4))}
    (crop,) = crops(data, number=1)
    assert crop["padded"] == 1
    expected = torch.zeros(1, 10, 10, 10)
    expected[..., 3:7] = 1
    assert torch.equal(crop["image"].as_tensor(), expected)


def said(caplog):
    return [record.getMessage() for record in caplog.records if "body_crops" in record.name]


def count(batches, *, every=1, accumulation_steps=1):
    """Run an engine over batches of (padded, redrawn, airy) per crop."""
    engine = Engine(lambda engine, batch: None)
    engine.accumulation_steps = accumulation_steps
    CropCounts(every=every).attach(engine)
    names = ("padded", "redrawn", "airy")
    engine.run([dict(zip(names, torch.tensor(batch).T, strict=True)) for batch in batches])
    return engine


def test_counts_are_summed_over_crops_and_steps(caplog):
    with caplog.at_level(logging.INFO):
        engine = count([[(0, 0, 0), (1, 3, 0)], [(0, 0, 0), (0, 0, 0)], [(1, 19, 1), (0, 2, 0)]])
    assert engine.state.crops == {"padded": 2, "redrawn": 24, "airy": 1}
    assert caplog.text.count("smaller than the ROI") == 1
    lines = [line for line in said(caplog) if "drawn again" in line]
    assert [line.split()[0] for line in lines] == ["3", "24"]  # nothing new, no line
    assert "1 kept" in lines[1]


def test_lines_come_when_a_log_is_due(caplog):
    with caplog.at_level(logging.INFO):
        count(8 * [[(0, 1, 0)]], every=2, accumulation_steps=2)
    assert [line.split()[0] for line in said(caplog)] == ["4", "8"]


def test_counts_are_kept_with_the_state_of_the_engine():
    engine = count([[(1, 0, 0)]])
    assert engine.state_dict()["crops"] == {"padded": 1, "redrawn": 0, "airy": 0}


def test_only_rank_0_speaks(monkeypatch, caplog):
    monkeypatch.setattr("bundles.pretraining.crops.body_crops.rank", lambda: 1)
    with caplog.at_level(logging.INFO):
        count([[(1, 5, 1)]])
    assert not said(caplog)


def test_positions_are_those_of_numpys_generator_whoever_reads():
    """A run that is resumed, or reads from another place, goes on with the crops that it would have had."""
    transform = RandBodyCropsd("image", roi_size=(10, 20, 5), num_samples=3, threshold=0.25, min_body=0.5, tries=4)
    read = []

    def reader(box):
        read.append(box)
        return torch.full((1, 10, 20, 5), 0.2 if len(read) < 3 else 0.3)

    drawn = transform.set_random_state(seed=11).draw((40, 20, 6), reader)
    assert [counts for _, _, counts in drawn] == [{"redrawn": n, "airy": 0} for n in (2, 0, 0)]
    assert [box for _, box, _ in drawn] == read[2:]
    random = np.random.RandomState(11)
    expected = [(random.randint(0, 31), 0, random.randint(0, 2)) for _ in range(5)]
    assert [tuple(each.start for each in box) for box in read] == expected
    assert all(tuple(each.stop - each.start for each in box) == (10, 20, 5) for box in read)


def test_air_is_told_by_intensities_and_the_crop_is_kept_as_read():
    transform = RandBodyCropsd("image", roi_size=(4, 4, 4), num_samples=1, threshold=0.25, min_body=0.5)
    body = torch.full((1, 4, 4, 4), -400, dtype=torch.int16)
    ((crop, _, counts),) = transform.draw((9, 9, 9), lambda box: body, intensities=lambda hu: (hu + 1000) / 2000)
    assert crop is body and counts == {"redrawn": 0, "airy": 0}
    ((_, _, counts),) = transform.draw((9, 9, 9), lambda box: body)
    assert counts == {"redrawn": 19, "airy": 1}
