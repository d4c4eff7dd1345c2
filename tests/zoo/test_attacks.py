# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Weights whose records are code open with weights_only=True. They are refused everywhere, and nothing of them runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bundles.common.errors import InputError
from bundles.common.weights.checkpoint_file import checkpoint_facts
from tests.workflows.command_line import run_bundle
from zoo.package.packed_weights import read_weights
from zoo.verify import main as verify

from .conftest import save_btcv


def planted(folder: Path, place: tuple[str, ...], value: object) -> Path:
    """A file of weights of BTCV with a value planted in its records."""
    folder.mkdir(exist_ok=True)
    content = torch.load(save_btcv(folder) / "model.pt", weights_only=True)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    torch.save(content, folder / "model.pt")
    assert torch.load(folder / "model.pt", weights_only=True)  # it opens without running anything
    return folder / "model.pt"


def attacks(marker: Path) -> dict[str, tuple[tuple[str, ...], object]]:
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    build = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(marker)]}}
    return {
        "expression as spacing": (("trained", "spacing"), f"$[{code}]"),
        "expression in a list": (("trained", "roi_size"), [f"${code}", 64, 32]),
        "expression after blanks": (("trained", "hu_window"), f"  $[{code}]"),
        "expression as feature size": (("encoder", "feature_size"), f"${code}"),
        "expression as merging": (("encoder", "merging"), f"${code}"),
        "expression as preset": (("trained", "preset"), f"${code}"),
        "expression as a label": (("labels", "1"), f"${code}"),
        "expression as the key of a label": (("labels", f"${code}"), "liver"),
        "component as window": (("trained", "hu_window"), build),
        "component deep inside": (("trained", "plan"), {"a": [{"b": build}]}),
        "reference": (("trained", "spacing"), "@bundle_root"),
        "macro": (("trained", "spacing"), "%/etc/config.yaml::x"),
        "expression in a row": (("row",), {"spacing": f"${code}", "labels": {"0": "background"}}),
    }


@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_records_that_are_code_are_refused_on_opening_and_packing(tmp_path, attack):
    place, value = attacks(tmp_path / "ran")[attack]
    model = planted(tmp_path / "m", place, value)
    with pytest.raises(InputError, match=r"model\.pt was refused: its record (trained|encoder|labels|row)"):
        checkpoint_facts(str(model))
    with pytest.raises(InputError, match=r"model\.pt was refused: its record (trained|encoder|labels|row)"):
        read_weights(model.parent)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [(("trained", "spacing"), "1.5"), (("trained", "roi_size"), [None, 64, 32]), (("encoder", "depths"), {"a": 1})],
)
def test_what_goes_into_configs_is_numbers_alone(tmp_path, place, value):
    model = planted(tmp_path / "m", place, value)
    with pytest.raises(InputError, match=f"its record {'::'.join(place)} is .*not a number or a list of numbers"):
        read_weights(model.parent)


@pytest.mark.parametrize("workflow", ["evaluate", "inference", "convert"])
def test_no_workflow_runs_them(tmp_path, scan, workflow):
    place, value = attacks(tmp_path / "ran")["expression as spacing"]
    model = planted(tmp_path / "m", place, value)
    if workflow == "convert":
        run = run_bundle("swin_unetr_pretrain", "convert.yaml", source=model, target=tmp_path / "encoder.pt")
    else:
        options = {"dataset_dir": scan, "pretrained_model": model, "output_dir": tmp_path / "out", "preset": "cpu"}
        run = run_bundle("swin_unetr_btcv_seg", f"{workflow}.yaml", **options)
    assert run.returncode == 1 and "model.pt was refused: its record trained::spacing" in run.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "encoder.pt").exists()


def test_a_folder_with_planted_configs_is_not_run_unasked(tmp_path, capsys):
    """A crafted package: its config is the attack, whatever its weights are."""
    folder = tmp_path / "swin_unetr_btcv_seg"
    (folder / "configs").mkdir(parents=True)
    code = f"$__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    (folder / "configs" / "inference.json").write_text('{"network_def": "' + code.replace('"', "'") + '"}')
    (folder / "configs" / "metadata.json").write_text('{"version": "0.1.0"}')
    assert verify([str(folder)]) == 1
    assert "--run_code" in capsys.readouterr().out and not (tmp_path / "ran").exists()
