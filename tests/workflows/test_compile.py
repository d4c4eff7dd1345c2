# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""``--compile`` of both trainings, through the command line: the same losses, and checkpoints that fit either way."""

from __future__ import annotations

import pytest
import torch

from bundles.common.training.log import read_log

from .command_line import SMALL, run_bundle, succeed

OPTIONS = {**SMALL, "roi_size": "[64,64,32]", "max_steps": 2, "val_interval": 2, "tensorboard": "false"}
# AOTAutograd without code generation, which takes minutes on a CPU: tests/common/networks/test_compiled.py has it.
QUICK = {"compiled::backend": "aot_eager"}


def losses(folder):
    return [row["loss"] for row in read_log(folder / "training_log.csv")]


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "choice"), [("swin_unetr_pretrain", "decoder"), ("swin_unetr_btcv_seg", "network")])
def test_a_compiled_training_is_the_training_and_may_stop_or_begin_anywhere(tmp_path, bundle, choice, request):
    data = request.getfixturevalue("unlabelled" if bundle == "swin_unetr_pretrain" else "btcv")
    compiled = {"compile": choice, **QUICK}
    further = {"max_steps": 4, "resume": "true", "resume_changes": "['max_steps']"}

    def train(name, **options):
        options = {**OPTIONS, "warmup_steps": 0, "dataset_dir": data, "output_dir": tmp_path / name, **options}
        return succeed(run_bundle(bundle, "train.yaml", **options))

    said = train("mixed", **compiled)  # two steps compiled, two not
    assert "regions are compiled when they are first called" in said and f"(--compile {choice})" in said
    train("mixed", **further)
    assert "regions are compiled" not in train("other")  # two steps not compiled, two compiled
    assert losses(tmp_path / "mixed")[:2] == pytest.approx(losses(tmp_path / "other"), rel=1e-4)
    train("other", **further, **compiled)
    one, other = losses(tmp_path / "mixed"), losses(tmp_path / "other")
    assert len(one) == 4 and one == pytest.approx(other, rel=1e-3) and len(set(one)) == 4
    models = [torch.load(tmp_path / name / "models" / "model.pt", weights_only=True) for name in ("mixed", "other")]
    assert models[0]["model"].keys() == models[1]["model"].keys()
    assert not any("_orig_mod" in name for name in models[0]["model"])


def test_what_cannot_be_compiled_is_said_before_any_scan_is_read(tmp_path):
    options = {"dataset_dir": tmp_path, "output_dir": tmp_path / "out", **SMALL, "device": "cpu", "compile": "graphs"}
    for bundle in ("swin_unetr_pretrain", "swin_unetr_btcv_seg"):
        ended = run_bundle(bundle, "train.yaml", **options)
        assert ended.returncode == 1
        assert ended.stderr.splitlines()[-1].startswith("Stopped: --compile graphs needs a GPU, and this run is on cpu")
