# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Floor, ceiling and chain: each differs from scratch in what its name says alone, and grows with its scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from evidence.results.convergence import chain_run
from evidence.runs.study_plan import write_study_plan

from ..made_up_study import parts, planner

CONVERGENCE = {"seeds": [10, 11], "gain": 0.005, "most": 400}
HEADROOM = {"n": [2, 4], "seeds": [0, 1], "floor": True, "ceiling": True, "convergence": CONVERGENCE}
STEPS = {2: 50, 4: 60, 12: 70}  # 12: all


def made(**changes):
    return planner(headroom={**HEADROOM, **changes}, steps=STEPS)


def named(runs):
    return {run.name: run for run in runs}


def test_runs_are_counted_by_hand():
    runs = made().headroom()
    names = sorted(run.name for run in runs)
    assert names == sorted(
        [
            *(f"pretrain_floor_seed{seed}" for seed in (0, 1)),
            *(f"finetune_{arm}_n{n}_seed{seed}" for arm in ("floor", "scratch") for n in (2, 4) for seed in (0, 1)),
            *(f"finetune_scratch_n12_seed{seed}" for seed in (0, 1)),
        ]
    )
    bare = made(floor=False, ceiling=False).headroom()
    assert not any("floor" in run.name or "n12" in run.name for run in bare) and len(bare) == 4


def test_the_floor_differs_from_scratch_by_its_frozen_random_encoder_alone():
    runs = named(made().headroom())
    floor, scratch = (dict(runs[f"finetune_{arm}_n2_seed1"].commands[0].options) for arm in ("floor", "scratch"))
    assert floor.pop("freeze_encoder") is True
    assert floor.pop("pretrained_encoder") == Path("runs/pretrain_floor_seed1/train/models/encoder.pt")
    assert floor.pop("output_dir") != scratch.pop("output_dir")
    assert floor == scratch and scratch["warmup_steps"] == 5
    untrained = runs["pretrain_floor_seed1"].commands[0].options
    # The first step of a warm-up from 0 has the learning rate 0.
    assert (untrained["max_steps"], untrained["warmup_steps"], untrained["seed"]) == (1, 1, 1)
    assert runs["finetune_floor_n2_seed1"].needs == ("pretrain_floor_seed1",)


def test_the_ceiling_trains_on_all_that_are_not_set_apart():
    run = named(made().headroom())["finetune_scratch_n12_seed0"]
    assert sorted(run.cases["training"]) == sorted(parts().training) and run.facts["steps"] == 70
    assert "pretrained_encoder" not in run.commands[0].options
    with pytest.raises(InputError, match="steps has no entry for n = 12"):
        planner(headroom=HEADROOM, steps={2: 50, 4: 60}).headroom()


def test_a_link_of_the_chain_is_scored_on_tuning_patients_with_its_own_schedule():
    run = made().chains()[2].links[50][0]
    assert run.name == chain_run(2, 10, 50)
    assert list(run.cases["scored"]) == list(parts().tuning)
    assert run.commands[0].options["max_steps"] == 50 and run.commands[0].options["seed"] == 10
    assert run.commands[0].options["resume"] is True and run.commands[0].options["warmup_steps"] == 5


def test_a_chain_has_a_link_for_each_doubling_that_is_allowed():
    chain = made().chains()[2]
    assert list(chain.links) == [50, 100, 200, 400] and list(chain.converged) == [100, 200, 400]
    assert [run.name for run in chain.links[200]] == [chain_run(2, seed, 200) for seed in (10, 11)]
    assert list(made().chains()[4].links) == [60, 120, 240]
    assert made(convergence=None).chains() == {} and planner().chains() == {}


def test_the_chosen_steps_are_run_with_the_studys_seeds_on_the_scored_patients():
    runs = made().chains()[2].converged[100]
    assert [run.name for run in runs] == [f"finetune_converged_n2_seed{seed}_steps100" for seed in (0, 1)]
    for run in runs:
        assert list(run.cases["scored"]) == list(parts().validation)
        assert run.facts["arm"] == "converged" and run.commands[0].options["max_steps"] == 100


def test_the_plan_names_the_runs_of_each_link(tmp_path):
    write_study_plan(made(), tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["chains"]["2"]["links"]["50"] == [chain_run(2, 10, 50), chain_run(2, 11, 50)]
    assert plan["chains"]["2"]["converged"]["400"] == [f"finetune_converged_n2_seed{seed}_steps400" for seed in (0, 1)]
    assert not any("converge" in name for name in plan["parts"]["headroom"])
    assert {
        name for chain in plan["chains"].values() for kind in chain.values() for runs in kind.values() for name in runs
    } <= set(plan["runs"])


def test_a_study_without_headroom_says_so():
    with pytest.raises(InputError, match="made_up has no headroom"):
        planner().headroom()
