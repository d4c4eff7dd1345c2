# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The stages of the demo: their commands, what they write, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from .stage import Stage

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = "bundles/swin_unetr_pretrain"
SEGMENT = "bundles/swin_unetr_btcv_seg"
ROOMS = {
    PRETRAIN: "bundles/pretraining",
    SEGMENT: "bundles/segmentation",
}  # the code of a bundle, in addition to the shared code
NSD_TOLERANCE = 4  # mm, about one voxel of the cpu preset's grid (4 x 4 x 5 mm)
TEST_PATIENTS = 5  # fewer give no interval worth showing; each costs about two seconds in every evaluation


def stages(out: Path, *, pretrain_steps: int | None = None, finetune_steps: int | None = None) -> list[Stage]:
    """Return the stages of the demo in the order in which they run.

    Args:
        out: the demo's folder.
        pretrain_steps: pre-training steps; None: as in the ``cpu`` preset.
        finetune_steps: steps of each fine-tuning; None: as in the ``cpu`` preset.
    """
    demo = _Demo(out, pretrain_steps, finetune_steps)
    everything = [
        demo.data(),
        demo.pretraining(),
        demo.finetuning(
            "finetune",
            "Fine-tuning from the encoder",
            "swin_unetr_btcv_seg",
            pretrained_encoder=demo.path("swin_unetr_pretrain", "models", "encoder.pt"),
        ),
        demo.finetuning("from_scratch", "Fine-tuning from scratch", "from_scratch"),
        demo.finetuning(
            "shuffled_labels", "Control: shuffled labels", "shuffled_labels", data_list="dataset_shuffled.json"
        ),
        demo.evaluation("finetune", "Scores: encoder", "swin_unetr_btcv_seg"),
        demo.evaluation("from_scratch", "Scores: scratch", "from_scratch"),
        demo.evaluation("shuffled_labels", "Scores: shuffled labels", "shuffled_labels"),
        demo.segmentation(),
    ]
    return [*everything, demo.report(needs=[stage.name for stage in everything])]


@dataclass(frozen=True)
class _Demo:
    """Makes the stages of a demo; `stages` explains the attributes."""

    out: Path
    pretrain_steps: int | None
    finetune_steps: int | None

    def path(self, *parts: str) -> str:
        """Return a path in the demo's folder as a user would type it in the repository's root: relative if inside."""
        path = self.out.joinpath(*parts)
        return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()

    def data(self) -> Stage:
        return Stage(
            name="data",
            title="Synthetic patients",
            command=["-m", "tools.synthetic_ct", "--out", self.path("data"), "--test", str(TEST_PATIENTS)],
            outputs=["data/*labelled/dataset*.json", "data/*/*/*.nii.gz"],
            code=[ROOT / "tools" / name for name in ("synthetic_ct.py", "synthetic_patient.py")],
            seconds=10,
        )

    def pretraining(self) -> Stage:
        folder = "swin_unetr_pretrain"
        panels = [f"{folder}/panel_{task}.png" for task in ("inpainting", "rotation", "contrast")]
        return Stage(
            name="pretrain",
            title="Pre-training without labels",
            command=_bundle_run(
                PRETRAIN,
                "train",
                dataset_dir=self.path("data", "unlabelled"),
                output_dir=self.path(folder),
                **_max_steps(self.pretrain_steps),
                **self._tracked("pretrain", folder),
            ),
            outputs=[
                *(f"{folder}/models/{name}.pt" for name in ("model", "encoder")),
                *(f"{folder}/training_log.csv", f"{folder}/validation.json", *panels),
            ],
            needs=["data"],
            code=_code(PRETRAIN),
            folder=folder,
            resume=["--resume", "true"],
            seconds=12 + 0.6 * _steps(PRETRAIN, self.pretrain_steps),
        )

    def finetuning(self, name: str, title: str, folder: str, **options: object) -> Stage:
        """Return a fine-tuning; ``options`` are those in which it differs from the others."""
        return Stage(
            name=name,
            title=title,
            command=_bundle_run(
                SEGMENT,
                "train",
                dataset_dir=self.path("data", "labelled"),
                output_dir=self.path(folder),
                **options,
                **_max_steps(self.finetune_steps),
                **self._tracked(name, folder),
            ),
            outputs=[f"{folder}/models/model.pt", f"{folder}/training_log.csv"],
            needs=["data", "pretrain"] if "pretrained_encoder" in options else ["data"],
            code=_code(SEGMENT),
            folder=folder,
            resume=["--resume", "true"],
            seconds=12 + 0.6 * _steps(SEGMENT, self.finetune_steps),
        )

    def evaluation(self, run: str, title: str, folder: str) -> Stage:
        return Stage(
            name=f"evaluate_{run}",
            title=title,
            command=_bundle_run(
                SEGMENT,
                "evaluate",
                dataset_dir=self.path("data", "labelled"),
                section="test",
                pretrained_model=self.path(folder, "models", "model.pt"),
                nsd_tolerance=NSD_TOLERANCE,
                output_dir=self.path(folder, "evaluation"),
            ),
            outputs=[f"{folder}/evaluation/scores.csv", f"{folder}/evaluation/summary.json"],
            needs=["data", run],
            code=_code(SEGMENT),
            folder=f"{folder}/evaluation",
            seconds=14,
        )

    def segmentation(self) -> Stage:
        return Stage(
            name="segment",
            title="Segmentation of unseen scans",
            command=_bundle_run(
                SEGMENT,
                "inference",
                dataset_dir=self.path("data", "labelled", "imagesTs"),
                pretrained_model=self.path("swin_unetr_btcv_seg", "models", "model.pt"),
                output_dir=self.path("segmentation"),
            ),
            outputs=["segmentation/*_seg.nii.gz", "segmentation/*_overlay.png"],
            needs=["data", "finetune"],
            code=_code(SEGMENT),
            folder="segmentation",
            seconds=14,
        )

    def report(self, *, needs: list[str]) -> Stage:
        return Stage(
            name="report",
            title="Report",
            command=["-m", "demo.report", "--out", self.path()],
            outputs=["report.html"],
            needs=needs,
            code=[ROOT / "demo" / name for name in ("report.py", "report.html.jinja", "findings.py", "summary.py")],
            seconds=12,
        )

    def _tracked(self, run: str, folder: str) -> dict[str, object]:
        return {
            "tracking": "mlflow",
            "tracking_uri": f"sqlite:///{(self.out / 'mlruns.db').as_posix()}",
            "experiment_name": "demo",
            "run_name": run,
            "save_execute_config": self.path(folder, "executed_config.json"),
        }


def _bundle_run(bundle: str, config: str, **options: object) -> list[str]:
    words = ["-m", "monai.bundle", "run", "--config_file", f"{bundle}/configs/{config}.yaml"]
    options = {"bundle_root": bundle, "preset": "cpu"} | options
    return words + [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def _code(bundle: str) -> list[Path]:
    """Return the files on whose content the results of a bundle's commands depend."""
    return [ROOT / name for name in ("bundles/common", ROOMS[bundle], f"{bundle}/configs", f"{bundle}/scripts")]


def _max_steps(requested: int | None) -> dict[str, int]:
    return {} if requested is None else {"max_steps": requested}


def _steps(bundle: str, requested: int | None) -> int:
    """Return the number of training steps: the requested one, or that of the ``cpu`` preset."""
    presets = yaml.safe_load((ROOT / bundle / "configs" / "presets.yaml").read_text())
    return requested or presets["cpu"]["max_steps"]
