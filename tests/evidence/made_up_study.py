# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A study without scans: patients are only names, and results have a known gain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bundles.common.files import write_text
from bundles.common.networks.swin_unetr import build_encoder
from evidence.runs.plan import Planner
from evidence.study.reading import check_study
from evidence.study.study import Study
from evidence.study.subsets import Parts
from tools.bundle_runs import Run, unique

REPORT = tuple(f"{part}.{kind}" for part in ("curve", "ablation") for kind in ("csv", "md", "png"))
LABELS = {"0": "background", "1": "liver", "2": "left kidney"}
ROW = {
    "modality": "CT",
    "channels": ["CT"],
    "labels": LABELS,
    "spacing": [4.0, 4.0, 5.0],
    "hu_window": [-175.0, 250.0],
    "roi_size": [64, 64, 32],
    "foreground": -175.0,
    "nsd_tolerance": 4.0,
}
CONTENT = {
    "name": "made_up",
    "preset": "cpu",
    "tuning": 3,
    "row": ROW,
    "pretraining": {"max_steps": 100, "learning_rate": 0.001},
    "finetuning": {"learning_rate": 0.02},
    "arms": {
        "scratch": {"pretraining": None, "finetuning": {"warmup_steps": 5}},
        "pretrained": {"pretraining": {}, "finetuning": {"encoder_lr_decay": 0.75}},
    },
    "steps": {2: 50, 4: 60},
    "curve": {"n": [2, 4], "seeds": [0, 1, 2], "encoder_per_seed": True},
    "ablation": {"n": 2, "seeds": [0, 1], "encoder_per_seed": False, "arm": "pretrained", "subsets": None},
    "search": {
        "n": 2,
        "seeds": [9],
        "grid": {"learning_rate": [0.01, 0.02]},
        "grid_of": {"scratch": {"warmup_steps": [1, 9]}, "pretrained": {"encoder_lr_decay": [0.5, 1.0]}},
    },
}


@dataclass(frozen=True)
class Plan:
    """Runs of some parts of a study, and its outline."""

    study: Study
    runs: tuple[Run, ...]
    outline: Mapping[str, Any] = field(default_factory=dict)


def plan_of(planner: Planner, parts: Sequence[str]) -> Plan:
    """Return the runs of parts of a study, with all that a chain of its headroom may need."""
    runs = [run for part in parts for run in getattr(planner, part)()]
    chains = planner.chains().values() if "headroom" in parts else ()
    runs += [run for chain in chains for steps in (chain.links, chain.converged) for run in sum(steps.values(), [])]
    return Plan(planner.study, tuple(unique(runs)), planner.outline())


def patients(prefix: str, number: int) -> dict[str, dict[str, str]]:
    """Make cases without files."""
    return {
        f"{prefix}_{i:02d}": {"image": f"/data/{prefix}_{i:02d}.nii.gz", "label": f"/data/l/{prefix}_{i:02d}.nii.gz"}
        for i in range(number)
    }


def parts(training: int = 12, tuning: int = 3, validation: int = 20) -> Parts:
    """Make the parts of a data set without files."""
    return Parts(
        training=patients("train", training),
        tuning=patients("tune", tuning),
        validation=patients("val", validation),
        unlabelled=({"image": "/data/more.nii.gz"},),
        labels=LABELS,
        modality={"0": "CT"},
    )


def rewrite(data: Path, change: Callable[[dict], object]) -> None:
    """Change the data list of a folder."""
    content = json.loads((data / "dataset.json").read_text())
    change(content)
    (data / "dataset.json").write_text(json.dumps(content))


def planner(**changes: object) -> Planner:
    """Return the planner of the made-up study, with changed entries."""
    study = check_study({**CONTENT, **changes}, source="made_up.yaml")
    return Planner(study, parts(), row={**ROW, "name": "made_up"}, task=Path("task.yaml"))


def made_up_scores(run, *, gain: float, seed: int = 0) -> list[dict]:
    """Make scores of a run: difficulty of a patient and luck of a seed, equal in both arms, and the encoder's gain."""
    names = list(LABELS.values())[1:]
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(0, 0.1, (len(run.cases["scored"]), len(names)))
    luck = np.random.default_rng([seed, run.facts["seed"], run.facts["n"]]).normal(0, 0.02)
    number = sum(map(ord, run.name))
    noise = np.random.default_rng([seed, number]).normal(0, 0.01, difficulty.shape)
    dice = 0.5 + difficulty + luck + noise + (gain if run.facts["encoder"] else 0.0)
    rows = []
    for i, case in enumerate(run.cases["scored"]):
        for j, label in enumerate(names):
            missing = i == 3 and j == 1  # neither mask contains the organ
            missed = i == 5 and j == 0  # only the reference contains the organ
            value = 0.0 if missed else round(float(dice[i, j]), 6)
            row = {"case": case, "label": label, "dice": value, "nsd": value, "hd95": 20 - 10 * value}
            row |= dict.fromkeys(("dice", "nsd", "hd95")) if missing else {}
            rows.append(row | ({"hd95": None} if missed else {}))
    return rows


def made_up_figures(tasks, *, seed: int) -> dict[str, float]:
    """Make the figures of a pre-training's last validation: 64 views in batches of eight, rotation above chance."""
    figures = {"steps": 100, "views": 64, "loss": 2.0}
    if "inpainting" in tasks:
        figures |= {"loss_inpainting": 0.1, "masked_psnr": 12.0 + seed / 3}
    if "contrast" in tasks:
        figures |= {"loss_contrast": 1.2 + seed / 7, "contrast_top1": 0.6, "contrast_without_learning": math.log(7)}
    return figures | ({"rotation_accuracy": 0.5} if "rotation" in tasks else {})


def encoder_file(record, *, steps: int) -> dict:
    """Return the content of an ``encoder.pt`` whose best weights are those of a step."""
    weights = {f"swinViT.{name}": value for name, value in build_encoder(record).state_dict().items()}
    return {"state_dict": weights, "encoder": record, "trained": {"steps": steps}}


def finished(run, *, gain: float = 0.05) -> dict:
    """Return the content of ``done.json`` of a finished run."""
    done = {"settings": run.settings, "seconds": 60.0 + len(run.name)}
    if run.kind == "pretraining":
        done["figures"] = made_up_figures(run.facts["tasks"], seed=run.facts["seed"])
    return done | ({"scores": made_up_scores(run, gain=gain)} if run.kind == "finetuning" else {})


def write_study(out: Path, plan: Plan, *, gain: float, unfinished: tuple[str, ...] = ()) -> None:
    """Write the folder of a study in which all runs except some are finished."""
    write_text(out / "outline.json", json.dumps(plan.outline))
    for run in plan.runs:
        if run.name not in unfinished:
            folder = out / "runs" / run.name
            write_text(folder / "settings.json", json.dumps(run.settings))
            write_text(folder / "done.json", json.dumps(finished(run, gain=gain)))


def rescore(out: Path, plan: Plan, dice: Callable[[Run, str, str], float]) -> None:
    """Give every finished fine-tuning of a plan new scores.

    Args:
        out: folder of the study.
        plan: its plan.
        dice: returns the Dice of a run, case and label.
    """
    for run in plan.runs:
        path = out / "runs" / run.name / "done.json"
        if run.kind == "finetuning" and path.exists():
            done = json.loads(path.read_text())
            for row in done["scores"]:
                row["dice"] = row["nsd"] = dice(run, row["case"], row["label"])
            write_text(path, json.dumps(done))


def one_sided(out: Path, plan: Plan, *, case: str = "val_03", label: str = "left kidney") -> None:
    """Let only the runs with an encoder predict an organ that the case's label file does not contain."""
    for run in plan.runs:
        done = finished(run, gain=0.05)
        for row in done.get("scores", []):
            if (row["case"], row["label"]) == (case, label):
                row |= dict.fromkeys(("dice", "nsd"), 0.0 if run.facts["encoder"] else None) | {"hd95": None}
        write_text(out / "runs" / run.name / "done.json", json.dumps(done))


def whole_plan(**changes: object) -> Plan:
    """Return the plan of curve and ablation of the made-up study."""
    return plan_of(planner(**changes), ["curve", "ablation"])
