# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A person reads the output of a whole chain: sentences, one time format, and commands that work when they are copied."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import mlflow
import pytest

from ..forked_python import run as run_python
from .command_line import BUNDLES, SMALL, run_bundle, succeed

#: Text that only Python or its libraries would write.
NOT_FOR_PEOPLE = re.compile(
    r"\{'|\['|\('|\[\d+, |\[\d+\.\d+, |\(\d+, \d|\(s\)|\b1 (?:scans|cases|tensors|steps|validations)\b|None\b|Warning:|"
    r"nvImageCodec|always_return_as_numpy|worker processes|mlflow\.store|INFO|input summary"
)
LINE = re.compile(r"\d\d:\d\d:\d\d {1,3}\S")
#: Lines of a table, or a command below the line that announces it.
CONTINUED = re.compile(
    r"  python -m monai|[\w/-]+ {2,}\S|[A-Z].* cases? |with Dice 0|.*[┏┃┡│├└━]| +\S.* a row proposed"
)


def told(output: str) -> list[str]:
    """Lines of a run's output; fails at what a person cannot read. The interval of a score is in brackets."""
    lines = [line for line in output.splitlines() if line.strip()]
    command, *others = lines
    assert LINE.match(command) and " python -m monai.bundle run --config_file " in command
    for line in others:
        assert LINE.match(line) or CONTINUED.match(line), line
        if " python -m monai.bundle run " not in line and "--max_steps" not in line:
            assert not NOT_FOR_PEOPLE.search(re.sub(r"\[\d\.\d{4}, \d\.\d{4}\]", "", line)), line
    return lines


def after(lines: list[str], beginning: str) -> str:
    """The command below the line that begins so, without its time."""
    (place,) = [number for number, line in enumerate(lines) if line[9:].startswith(beginning)]
    return lines[place + 1].strip()


def repeat(command: str, **options: object) -> list[str]:
    """Run a copied command from the folder of the run that told it; return what it tells."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "monai.bundle", "run"]
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = run_python([*words[1:], *more], cwd=BUNDLES / "swin_unetr_btcv_seg", env=environment, timeout=600)
    return told(succeed(ended))


def store(output: Path) -> str:
    return f"sqlite:///{output}/mlruns.db"


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tracked") / "spleen trial"


@pytest.fixture(scope="module")
def trained(output, btcv) -> list[str]:
    options = {**SMALL, "roi_size": "[64,64,32]", "max_steps": 8, "warmup_steps": 0, "log_every": 4}
    options |= {"dataset_dir": btcv, "output_dir": output, "tracking": "mlflow", "tracking_uri": store(output)}
    return told(succeed(run_bundle("swin_unetr_btcv_seg", "train.yaml", **options)))


def test_a_training_says_its_split_its_result_and_how_its_score_runs(trained, output):
    text = "\n".join(trained)
    assert f"training on 2 cases, validation on 1 case: img0002 ({output}/split.json)" in text
    assert re.search(rf"wrote {output}/models/model.pt: the weights of step \d, mean_dice 0\.\d{{4}}\n", text)
    assert re.search(
        "mean_dice still improves: .*--max_steps 16 --resume true|mean_dice hardly improves any more", text
    )
    assert f"mlflow ui --backend-store-uri {shlex.quote(store(output))}, then http://" in text


def test_the_copied_commands_score_the_model_and_segment_scans(trained, output, btcv):
    scored = repeat(after(trained, "next, scores of the validation cases:"))
    assert f"wrote scores.csv, summary.json and scores.png to {output}/evaluation" in "\n".join(scored)
    segment = after(trained, "next, masks of other scans:")
    assert "--dataset_dir SCAN.nii.gz" in segment
    segment = segment.replace("SCAN.nii.gz", str(btcv / "imagesTr" / "img0002.nii.gz"))
    segmented = repeat(segment)
    assert f"look at the picture: {output}/inference/img0002_overlay.png" in "\n".join(segmented)
    (head,) = [number for number, line in enumerate(segmented) if "volumes of 1 scan:" in line]
    assert segmented[head + 1].split() == ["ml", "img0002"] and segmented[head + 2].startswith("spleen ")

    client = mlflow.MlflowClient(store(output))
    runs = client.search_runs(client.get_experiment_by_name("monai_experiment").experiment_id)
    evaluation, training = sorted(runs, key=lambda run: "max_steps" in run.data.params)
    assert training.info.run_name.startswith("spleen trial_2") and training.info.status == "FINISHED"
    assert training.data.params.items() >= {"preset": "cpu", "seed": "0", "start": "scratch"}.items()
    assert training.data.params.items() >= {"roi_size": "64, 64, 32", "encoder_depths": "1, 1, 1, 1"}.items()
    assert {"learning_rate", "data", "network", "bundle_version", "torch_version"} <= training.data.params.keys()
    groups = {name.split("/")[0] for name in training.data.metrics}
    # MLflow shows the groups in this order. MONAI's train_loss, lr_group_0 and mean_dice are not there again.
    assert sorted(groups) == ["train", "validation", "weights_moved"]
    assert "validation/dice_liver" in training.data.metrics and "validation/dice_spleen" in training.data.metrics
    pictures = client.list_artifacts(training.info.run_id, "pictures/step_000008")
    assert [picture.path for picture in pictures] == ["pictures/step_000008/validation.png"]

    assert evaluation.info.run_name.startswith("spleen trial_evaluation_2")
    assert evaluation.data.params["model"] == f"{output}/models/model.pt"
    assert {"mean_dice", "mean_nsd", "dice_liver"} <= evaluation.data.metrics.keys()
    pictures = client.list_artifacts(evaluation.info.run_id, "pictures")
    assert [picture.path for picture in pictures] == ["pictures/img0002_overlay.png"]


def test_a_pre_training_tells_the_command_that_fine_tunes(unlabelled, tmp_path, btcv):
    options = {**SMALL, "roi_size": "[64,64,32]", "dataset_dir": unlabelled, "output_dir": tmp_path}
    lines = told(succeed(run_bundle("swin_unetr_pretrain", "train.yaml", **options)))
    assert f"training on 2 cases, validation on 1 case: site 2/scan ({tmp_path}/split.json)" in "\n".join(lines)
    command = after(lines, "next, fine-tuning from the encoder")
    assert f"--preset cpu --pretrained_encoder {tmp_path}/models/encoder.pt" in command
    small = {"roi_size": "[64,64,32]", "max_steps": 1, "output_dir": tmp_path / "fine"}
    fine_tuned = "\n".join(repeat(command.replace("LABELLED_DATA", str(btcv)), **small))
    assert f"{tmp_path}/models/encoder.pt: all encoder weights loaded (66 tensors)" in fine_tuned
