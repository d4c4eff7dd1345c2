# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Runs that are compared compute in the same floating-point precision, whichever machine carries them out.

Mixed precision depends on the GPU: float32 without one, float16 on older ones, bfloat16 on newer ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundles.common.errors import InputError
from tools.bundle_runs import SETTINGS, read_json

TRAINED = ("train", "evaluate")  # commands with the options amp and amp_type


def precision_of(options: Mapping[str, Any]) -> str:
    """Return the floating-point precision of a command on this machine: ``fp32``, ``bf16`` or ``fp16``.

    Args:
        options: options of the command. The defaults are those of the bundles' configs: mixed precision (``amp``) if
            there is a GPU, of the type (``amp_type``) that the GPU supports.
    """
    if options.get("amp") is False:
        return "fp32"
    import torch  # only here: it takes seconds

    from bundles.common.run.mixed_precision import precision

    return precision(amp=options.get("amp", torch.cuda.is_available()), amp_type=options.get("amp_type", "auto"))


def precision_of_run(planned: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Return command to precision on this machine; under ``encoder``, that of the pre-training it starts from.

    Args:
        planned: the run in ``plan.json``.
        out: folder of all runs.
    """
    commands = planned["settings"]["commands"]
    found = {name: precision_of(command["options"]) for name, command in commands.items() if name in TRAINED}
    for name in planned["needs"]:
        before = _recorded(out / "runs" / name / SETTINGS)
        if before and "train" in before:
            found["encoder"] = before["train"]
    return found


def check_precision(run: str, kind: str, now: Mapping[str, str], out: Path) -> None:
    """Refuse a precision other than that of an earlier attempt at this run, or of other runs of its kind.

    A run of an earlier version, which did not record its precision, is accepted with any.

    Args:
        run: name of the run.
        kind: its kind.
        now: its precision here, see `precision_of_run`.
        out: folder of all runs.

    Raises:
        InputError: they differ; names both.
    """
    for path in sorted((out / "runs").glob(f"*/{SETTINGS}"), key=lambda path: path.parent.name != run):
        before = _recorded(path, kind)
        if before and any(before.get(name, each) != each for name, each in now.items()):
            raise InputError(
                f"{path.parent} was computed in {_listed(before)}, but this process would compute {run} in "
                f"{_listed(now)}. Compared runs must have the same precision. Use one kind of GPU for all "
                "(CUDA_VISIBLE_DEVICES, or a partition of the cluster). Or start again in another output folder, with "
                "'amp: false', or 'amp: true' and one 'amp_type', in the options of trainings and evaluations."
            )


def _recorded(path: Path, kind: str | None = None) -> Mapping[str, str] | None:
    if not path.is_file():
        return None
    saved = read_json(path, "the run then continues with the settings of now")
    return saved.get("precision") if kind in (None, saved["kind"]) else None


def _listed(precision: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} ({command})" for command, kind in sorted(precision.items()))
