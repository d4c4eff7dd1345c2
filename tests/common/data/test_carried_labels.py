# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Cases with carried labels: how often they are visited, what is recorded, and where they are refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose

from bundles.common.data import carried_labels
from bundles.common.data.carried_labels import Visits, cases_record, check_notes, refuse_carried, visits
from bundles.common.data.seeded_crops import Draws, DrawSampler, SeededCrops
from bundles.common.errors import InputError

SCANS = [{"image": f"{i}", "label": f"l{i}", **({"carried": True} if i in (0, 2, 3) else {})} for i in range(5)]
REAL = {1, 4}
PLAN = {"real_repeats": 1, "real_only_steps": 0, "steps": 10, "accumulation_steps": 1, "batch_size": 1}


def draws(seed=0, scans=SCANS, **plan):
    return Draws(volumes=len(scans), seed=seed, shuffle=True, visits=visits(scans, **{**PLAN, **plan}))


def test_by_default_the_order_is_that_without_carried_labels():
    plain = Draws(volumes=5, seed=7, shuffle=True)
    expected = np.concatenate([np.random.default_rng([7, each]).permutation(5) for each in range(6)])
    assert [plain.volume_of(i) for i in range(30)] == expected.tolist()
    assert [draws(seed=7).volume_of(i) for i in range(30)] == expected.tolist()


def test_real_cases_are_visited_more_often_in_every_pass():
    planned = draws(real_repeats=3)
    for start in range(0, 90, 9):  # 2 x 3 + 3 visits
        visited = Counter(planned.volume_of(draw) for draw in range(start, start + 9))
        assert visited == {0: 1, 1: 3, 2: 1, 3: 1, 4: 3}
    assert len({tuple(planned.volume_of(draw) for draw in range(start, start + 9)) for start in range(0, 90, 9)}) == 10


@pytest.mark.parametrize(("accumulation", "batch", "processes"), [(1, 1, 1), (2, 3, 1), (1, 3, 2)])
def test_the_last_steps_see_real_cases_only(monkeypatch, accumulation, batch, processes):
    monkeypatch.setattr(carried_labels, "world_size", lambda: processes)
    planned = draws(real_only_steps=4, steps=10, accumulation_steps=accumulation, batch_size=batch)
    per_step = accumulation * batch * processes
    before = [planned.volume_of(draw) for draw in range(6 * per_step)]
    after = [planned.volume_of(draw) for draw in range(6 * per_step, 10 * per_step)]
    usual = draws()
    assert before == [usual.volume_of(draw) for draw in range(6 * per_step)]  # nothing changes until then
    assert set(after) == REAL
    assert max(Counter(after).values()) - min(Counter(after).values()) <= 1


def test_the_same_global_batch_visits_the_same_cases_on_one_and_on_two_processes(monkeypatch):
    one = draws(real_repeats=2, real_only_steps=3, batch_size=4)
    monkeypatch.setattr(carried_labels, "world_size", lambda: 2)
    two = draws(real_repeats=2, real_only_steps=3, batch_size=2)
    assert one == two


def test_the_last_stretch_has_an_order_of_its_own():
    scans = [{"image": str(i)} for i in range(20)] + [{"image": "c", "carried": True}]
    planned = draws(scans=scans, real_only_steps=15, steps=16, batch_size=7)
    passes = [[planned.volume_of(draw) for draw in range(start, start + 20)] for start in range(7, 87, 20)]
    assert all(sorted(order) == list(range(20)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert passes[0] != np.random.default_rng([0, 0]).permutation(20).tolist()


@pytest.mark.parametrize(
    ("scans", "plan", "words"),
    [
        (SCANS[4:], {"real_repeats": 2}, "--real_repeats 2 .* 0 of the 1 training cases"),
        (SCANS[:1], {"real_only_steps": 2}, "--real_only_steps 2 .* 1 of the 1 training cases"),
        (SCANS, {"real_only_steps": 10}, "--real_only_steps 10 leaves none of the 10 steps"),
    ],
)
def test_a_plan_without_effect_is_refused(scans, plan, words):
    with pytest.raises(InputError, match=words):
        visits(scans, **{**PLAN, **plan})
    assert visits(scans, **PLAN) == Visits(tuple(range(len(scans))))


def crops(data):
    items = [{**item, "image": torch.full((1, 2, 2, 2), float(i))} for i, item in enumerate(data)]
    return SeededCrops(data=items, preprocessing=Compose(), augmentation=Compose(), seed=0, cache_num=9)


def test_crops_carry_the_weight_of_their_case_and_no_other_note():
    dataset = crops([{"weight": 0.5, "carried": True}, {}, {"weight": 2}])
    loader = DataLoader(dataset, sampler=DrawSampler(iterations=2, batch_size=3), batch_size=3)
    for batch in loader:
        assert set(batch) == {"image", "draw", "weight"}
        weights = torch.tensor([0.5, 1.0, 2.0])
        assert torch.equal(batch["weight"], weights[batch["image"].flatten(1)[:, 0].long()])


def test_equal_weights_of_one_add_nothing_to_a_crop():
    dataset = crops([{"weight": 1, "carried": True}, {}])
    batch = next(iter(DataLoader(dataset, sampler=DrawSampler(iterations=1, batch_size=2), batch_size=2)))
    assert set(batch) == {"image", "draw"}


def test_the_record_counts_real_and_carried_cases_and_notices_other_weights():
    record = cases_record(SCANS)
    assert (record["real"], record["carried"]) == (2, 3)
    assert cases_record([{"image": "a"}, {"image": "b", "weight": 1}]) == {"real": 2, "carried": 0, "sha256": None}
    others = [SCANS[::-1][:4] + SCANS[:1], [{**SCANS[0], "weight": 0.5}, *SCANS[1:]], SCANS[:4]]
    assert len({cases_record(scans)["sha256"] for scans in [SCANS, *others]}) == 4


def test_carried_labels_are_refused_with_their_file():
    refuse_carried([SCANS[1]], where="list.json")
    with pytest.raises(InputError, match=r"^list.json has 3 cases with carried labels, such as l0:"):
        refuse_carried(SCANS, where="list.json")


@pytest.mark.parametrize("weight", [0, -1, "0.5", True, None, float("nan"), float("inf"), [1]])
def test_a_weight_is_a_number_above_zero(weight):
    with pytest.raises(InputError, match=r"a.json: training\[0\] has the weight"):
        check_notes({"weight": weight}, "a.json: training[0]")


@pytest.mark.parametrize("carried", [1, "true", None])
def test_carried_is_true_or_false(carried):
    with pytest.raises(InputError, match=r"a.json: training\[0\] has carried"):
        check_notes({"carried": carried}, "a.json: training[0]")
    check_notes({"carried": False, "weight": 3}, "")
