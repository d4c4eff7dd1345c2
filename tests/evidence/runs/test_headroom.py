# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Floor, ceiling and chain: each differs from scratch in what its name says alone, and grows with its scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundles.common.errors import InputError
from bundles.common.files import write_text
from evidence.results.convergence import chain_run
from evidence.run import plan_of

from ..made_up_study import finished, parts, planner

CONVERGENCE = {"seeds": [10, 11], "gain": 0.005, "most": 400}
HEADROOM = {"n": [2, 4], "seeds": [0, 1], "floor": True, "ceiling": True, "convergence": CONVERGENCE}
STEPS = {2: 50, 4: 60, 12: 70}  # 12: all


def made(out=None, **changes):
    result = planner(headroom={**HEADROOM, **changes}, steps=STEPS)
    result.out = out
    return result


def named(runs):
    return {run.name: run for run in runs}


def score(out, plan, steps, dice, n=2):
    """Finish the runs of a chain with this Dice everywhere."""
    for run in plan.runs:
        if run.name.startswith("converge_") and (run.facts["n"], run.facts["steps"]) == (n, steps):
            done = finished(run)
            for row in done["scores"]:
                row["dice"] = dice
            write_text(out / "runs" / run.name / "settings.json", json.dumps(run.settings))
            write_text(out / "runs" / run.name / "done.json", json.dumps(done))


def test_runs_are_counted_by_hand():
    runs = made().headroom()
    names = sorted(run.name for run in runs)
    assert names == sorted(
        [
            *(f"pretrain_floor_seed{seed}" for seed in (0, 1)),
            *(f"finetune_{arm}_n{n}_seed{seed}" for arm in ("floor", "scratch") for n in (2, 4) for seed in (0, 1)),
            *(f"finetune_scratch_n12_seed{seed}" for seed in (0, 1)),
            *(f"converge_scratch_n2_seed{seed}_steps50" for seed in (10, 11)),
            *(f"converge_scratch_n4_seed{seed}_steps60" for seed in (10, 11)),
        ]
    )
    bare = made(floor=False, ceiling=False).headroom()
    assert not any("floor" in run.name or "n12" in run.name for run in bare) and len(bare) == 8
    assert not any(run.name.startswith("converge") for run in made(convergence=None).headroom())


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
    run = named(made().headroom())[chain_run(2, 10, 50)]
    assert list(run.cases["scored"]) == list(parts().tuning)
    assert run.commands[0].options["max_steps"] == 50 and run.commands[0].options["seed"] == 10
    assert run.commands[0].options["resume"] is True and run.commands[0].options["warmup_steps"] == 5


def test_the_next_link_is_planned_when_all_seeds_of_the_one_before_are_scored(tmp_path):
    build = made(tmp_path)
    plan = plan_of(build, ["headroom"])
    assert chain_run(2, 10, 100) not in named(plan.runs)
    score(tmp_path, plan, 50, 0.5)
    (tmp_path / "runs" / chain_run(2, 11, 50) / "done.json").unlink()
    assert chain_run(2, 10, 100) not in named(plan.follow().runs)
    score(tmp_path, plan, 50, 0.5)
    plan = plan.follow()
    assert {chain_run(2, seed, 100) for seed in (10, 11)} <= set(named(plan.runs))
    assert chain_run(2, 10, 200) not in named(plan.runs) and chain_run(4, 10, 120) not in named(plan.runs)
    assert plan.chains == ("scratch with n = 2, 100 steps", "scratch with n = 4, 60 steps")


def test_the_chosen_steps_are_run_with_the_studys_seeds_on_the_scored_patients(tmp_path):
    build = made(tmp_path)
    for steps, dice in ((50, 0.5), (100, 0.55), (200, 0.552)):
        score(tmp_path, plan_of(build, ["headroom"]), steps, dice)
    runs = named(plan_of(build, ["headroom"]).runs)
    assert chain_run(2, 10, 400) not in runs
    found = [name for name in runs if "converged" in name]
    assert sorted(found) == [f"finetune_converged_n2_seed{seed}_steps100" for seed in (0, 1)]
    run = runs[found[0]]
    assert list(run.cases["scored"]) == list(parts().validation)
    assert run.facts["arm"] == "converged" and run.commands[0].options["max_steps"] == 100


def test_steps_that_are_enough_from_the_start_need_no_further_runs(tmp_path):
    build = made(tmp_path)
    for steps, dice in ((50, 0.5), (100, 0.5)):
        score(tmp_path, plan_of(build, ["headroom"]), steps, dice)
    assert not any("converged" in name for name in named(plan_of(build, ["headroom"]).runs))


def test_a_finished_chain_leaves_nothing_open(tmp_path):
    build = made(tmp_path, n=[2])
    plan = plan_of(build, ["headroom"])
    for steps, dice in ((50, 0.5), (100, 0.5)):
        score(tmp_path, plan, steps, dice)
        plan = plan.follow()
    assert plan.chains == () and plan.follow is None
    assert plan_of(build, ["curve"]).follow is None


def test_a_study_without_headroom_says_so():
    with pytest.raises(InputError, match="made_up has no headroom"):
        planner().headroom()
