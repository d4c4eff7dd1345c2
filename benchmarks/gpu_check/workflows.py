# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Part 4: pre-training, fine-tuning, evaluation and inference by MONAI's bundle runner, with AMP on the GPU.

Two chains run side by side, at small and at base size; times are not measured here. Both trainings stop after two
thirds of their steps and are resumed. The resumed pre-training of the small chain counts the waits for the device.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bundles.common.training.log import read_log
from bundles.common.weights.checkpoint_file import load_checkpoint_file

from .parts import Settings, attempt, tell

ROOT = Path(__file__).resolve().parents[2]
SYNC_WARNINGS = Path(__file__).resolve().parent / "sync_warnings"
WAIT = re.compile(r"^(.*?):(\d+): UserWarning: called a synchronizing CUDA operation")
PRETRAIN, SEGMENT = "swin_unetr_pretrain", "swin_unetr_btcv_seg"


@dataclass
class Chain:
    """The runs of one size.

    Attributes:
        name: ``small``, ``base`` or ``tiny``.
        options: options of the network and of the sliding window, for all runs.
        data: options of spacing and loading, for the trainings.
        steps: steps of each training; the first run makes two thirds of them.
        count_waits: whether the resumed pre-training counts its waits for the device.
    """

    name: str
    options: dict[str, Any]
    data: dict[str, Any]
    steps: int
    count_waits: bool = False
    running: list[subprocess.Popen] = field(default_factory=list)


def chains(dry_run: bool) -> list[Chain]:
    """Return the chains: small and base size, or a tiny one."""
    if dry_run:
        options = {"preset": "cpu", "roi_size": "[64,64,32]"}
        return [Chain("tiny", options, {"depths": "[1,1,1,1]", "tensorboard": "false"}, steps=6)]
    loading = {"num_workers": 4, "cache_num": 12, "tensorboard": "false"}
    small = {"preset": "official", "roi_size": "[64,64,64]", "spacing": "[2.0,2.0,2.0]"}
    base = {"preset": "official", "roi_size": "[96,96,96]", "spacing": "[1.5,1.5,2.0]"}
    return [
        Chain("small", small, {"feature_size": 24, **loading}, steps=60, count_waits=True),
        Chain("base", base, loading, steps=60),
    ]


def run(settings: Settings) -> None:
    """Run the chains, each in a thread that waits for its processes."""
    todo = chains(settings.dry_run)
    threads = [threading.Thread(target=run_chain, args=(chain, settings), daemon=True) for chain in todo]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_chain(chain: Chain, settings: Settings) -> None:
    """Run pre-training, fine-tuning, evaluation and inference; each takes the result of the one before."""
    out = settings.work / chain.name
    labelled, scan = settings.scans / "labelled", settings.scans / "labelled" / "imagesTs"
    first = max(2, 2 * chain.steps // 3)
    training = chain.options | chain.data | {"val_interval": first // 2, "warmup_steps": 2, "log_every": 1}
    resume = {"max_steps": chain.steps, "resume": "true", "resume_changes": "['max_steps']"}

    def train(bundle: str, name: str, title: str, **options: Any) -> None:
        options |= {"output_dir": out / name}
        label = f"{chain.name}: {title}"
        seconds, _ = bundle_run(bundle, "train", label, out, **(training | options), max_steps=first)
        told(label, seconds, training_facts(out / name, steps=range(1, first + 1)))
        waits = chain.count_waits and bundle == PRETRAIN
        seconds, errors = bundle_run(
            bundle, "train", f"{label}, resumed", out, waits=waits, **(training | options | resume)
        )
        facts = training_facts(out / name, steps=range(1, chain.steps + 1))
        if waits:
            facts |= waits_of(errors, steps=chain.steps - first)
        told(f"{label}, resumed", seconds, facts)

    def pretraining() -> None:
        train(PRETRAIN, "pretraining", "pre-training", dataset_dir=settings.scans / "unlabelled")

    def finetuning() -> None:
        encoder = {} if chain.name == "tiny" else {"feature_size": None}
        encoder |= {"depths": None, "pretrained_encoder": out / "pretraining" / "models" / "encoder.pt"}
        train(SEGMENT, "finetuning", "fine-tuning", dataset_dir=labelled, **encoder)

    model = {"pretrained_model": out / "finetuning" / "models" / "model.pt"}

    def evaluation() -> None:
        label, folder = f"{chain.name}: evaluation", out / "evaluation"
        options = chain.options | model | {"section": "test", "dataset_dir": labelled, "output_dir": folder}
        seconds, _ = bundle_run(SEGMENT, "evaluate", label, out, **options)
        with open(folder / "scores.csv", newline="") as file:
            dice = [float(row["dice"]) for row in csv.DictReader(file) if row["dice"]]
        told(label, seconds, {"ok": bool(dice), "mean_dice": sum(dice) / max(1, len(dice)), "organs": len(dice)})

    def inference() -> None:
        label, folder = f"{chain.name}: inference", out / "inference"
        seconds, _ = bundle_run(
            SEGMENT, "inference", label, out, **chain.options, **model, dataset_dir=scan, output_dir=folder
        )
        masks = sorted(path.name for path in folder.glob("*_seg.nii.gz"))
        told(label, seconds, {"ok": bool(masks), "masks": len(masks)})

    for title, step in (
        ("pre-training", pretraining),
        ("fine-tuning", finetuning),
        ("evaluation", evaluation),
        ("inference", inference),
    ):
        attempt(f"{chain.name}: {title}", step)


class RunFailed(Exception):
    """A run of MONAI's bundle runner ended with an error."""


def bundle_run(
    bundle: str, config: str, label: str, out: Path, *, waits: bool = False, **options: Any
) -> tuple[float, str]:
    """Run a workflow by ``python -m monai.bundle run``; its output goes to a file.

    Returns:
        The seconds that it took, and its stderr.

    Raises:
        RunFailed: its exit status is not 0; the message has its last line.
    """
    folder = ROOT / "bundles" / bundle
    command = [sys.executable, "-W", "always" if waits else "ignore", "-m", "monai.bundle", "run"]
    command += ["--config_file", str(folder / "configs" / f"{config}.yaml"), "--bundle_root", str(folder)]
    for name, value in options.items():
        command += [f"--{name}", "$None" if value is None else str(value)]
    path = [str(SYNC_WARNINGS)] if waits else []
    path += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    done = subprocess.run(
        command, cwd=out, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True
    )
    log = out / f"{re.sub(r'[^a-z]+', '_', label)}.log"
    log.write_text(f"{done.stdout}\n{done.stderr}")
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise RunFailed(f"exit status {done.returncode}: {last[0].strip()} (see {log})")
    return time.monotonic() - begin, done.stderr


def training_facts(folder: Path, *, steps: range) -> dict[str, Any]:
    """Return what the log and the checkpoint of a training say: losses, rows, skipped steps, memory."""
    rows = read_log(folder / "training_log.csv")
    last = load_checkpoint_file(folder / "models" / "last.pt")
    losses = [row["loss"] for row in rows]
    skipped = _find(last, "skipped_steps")
    complete = [row["step"] for row in rows] == list(steps)
    finite = all(abs(loss) < float("inf") for loss in losses)
    return {
        "ok": complete and finite and not skipped,
        "steps": len(rows),
        "complete": complete,
        "losses": losses,
        "finite": finite,
        "skipped_steps": skipped,
        "gpu_memory_gib": rows[-1].get("gpu_memory_gib") if rows else None,
        "precision": _find(last, "precision"),
    }


def waits_of(stderr: str, *, steps: int) -> dict[str, Any]:
    """Count CUDA's warnings of synchronising calls, and their five most frequent places."""
    places = Counter()
    for line in stderr.splitlines():
        if found := WAIT.match(line):
            file = re.sub(r".*/(?=monai/|torch/|ignite/|bundles/)", "", found[1])
            places[f"{file}:{found[2]}"] += 1
    return {
        "waits": sum(places.values()),
        "waits_per_step": sum(places.values()) / steps,
        "places": places.most_common(5),
    }


def told(label: str, seconds: float, facts: dict[str, Any]) -> None:
    """Report a result that has ``ok`` among its facts."""
    text = f"{label}: {seconds:.0f} s"
    if losses := facts.get("losses"):
        text += f", loss {losses[0]:.3f} to {losses[-1]:.3f} in {facts['steps']} steps"
        text += "" if facts["complete"] else " (steps are missing or repeated)"
        text += f", {facts['skipped_steps']} skipped, precision {facts['precision']}"
    if facts.get("gpu_memory_gib"):
        text += f", {facts['gpu_memory_gib']:.1f} GiB"
    if "waits" in facts:
        text += f", {facts['waits_per_step']:.1f} waits for the device a step"
    if "mean_dice" in facts:
        text += f", mean Dice {facts['mean_dice']:.3f} over {facts['organs']} organs"
    if "masks" in facts:
        text += f", {facts['masks']} mask(s)"
    tell(label, text=text, seconds=seconds, **facts)


def _find(content: Any, name: str) -> Any:
    """Return the value of the first key ``name`` at any depth of dictionaries, or None."""
    if not isinstance(content, Mapping):
        return None
    if name in content:
        return content[name]
    return next((found for value in content.values() if (found := _find(value, name)) is not None), None)
