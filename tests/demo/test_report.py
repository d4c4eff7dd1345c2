# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The demo's report and summary show what the files of the runs contain."""

from __future__ import annotations

import base64
import csv
import io
import json
import re

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from bundles.common.errors import InputError
from demo.report import curve_figure, dice_figure, main, write_report
from demo.summary import RUNS, clock, print_summary, score_text

DICE = {"swin_unetr_btcv_seg": (0.91, 0.62), "from_scratch": (0.83, 0.41), "shuffled_labels": (0.12, None)}


def evaluation(dice):
    labels = {
        organ: {
            "dice": {"mean": value, "std": 0.0, "n": 1},
            "nsd": {"mean": None if value is None else value / 2, "std": 0.0, "n": 1},
        }
        for organ, value in zip(("liver", "left_kidney"), dice, strict=True)
    }
    known = [value for value in dice if value is not None]
    mean = sum(known) / len(known)
    tolerance = {"liver": 4.0, "left_kidney": 4.0}
    return {
        "labels": labels,
        "mean_dice": mean,
        "mean_nsd": mean / 2,
        "tolerance": tolerance,
        "cases": ["img0004"],
    }


def write_log(path, parts):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["step", "loss", *(f"loss_{part}" for part in parts), "learning_rate", "crops_per_second"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([step] + [10 / step] * (1 + len(parts)) + [1e-3, 3.2] for step in (5, 10, 15))


@pytest.fixture
def out(tmp_path):
    """A made-up finished demo: two organs and one test scan, stored with a flipped left-right axis like most CT."""
    labelled, segmentation = tmp_path / "data/labelled", tmp_path / "segmentation"
    for folder in (labelled / "imagesTs", labelled / "labelsTs", tmp_path / "data/unlabelled", segmentation):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth = np.zeros((24, 20, 12), np.uint8)
    truth[2:9, 5:12, 3:9] = 1
    truth[14:20, 5:12, 3:9] = 2
    affine = np.diag((-4.0, 4.0, 5.0, 1.0))
    nib.save(
        nib.Nifti1Image(rng.integers(-200, 300, truth.shape, np.int16), affine), labelled / "imagesTs/img0004.nii.gz"
    )
    nib.save(nib.Nifti1Image(truth, affine), labelled / "labelsTs/label0004.nii.gz")
    nib.save(nib.Nifti1Image(np.roll(truth, 1, 0), affine), segmentation / "img0004_seg.nii.gz")
    case = {"image": "./imagesTs/img0004.nii.gz", "label": "./labelsTs/label0004.nii.gz"}
    lists = {
        "labelled": {
            "labels": {"0": "background", "1": "liver", "2": "left_kidney"},
            "training": [case, case],
            "validation": [case],
            "test": [case],
        },
        "unlabelled": {"training": [case] * 6, "validation": [case]},
    }
    for name, content in lists.items():
        (tmp_path / "data" / name / "dataset.json").write_text(json.dumps(content))

    pretraining = tmp_path / "swin_unetr_pretrain"
    write_log(pretraining / "training_log.csv", ("inpainting", "contrast", "rotation"))
    scores = {"views": 12, "loss": 2.0, "rotation_accuracy": 0.75, "contrast_top1": 0.5, "masked_psnr": 18.25}
    verdicts = {
        "rotation": {"learnt": True, "because": "75% right"},
        "contrast": {"learnt": False, "because": "as one"},
    }
    scores["verdicts"] = verdicts
    (pretraining / "validation.json").write_text(json.dumps(scores))
    for task in ("inpainting", "rotation", "contrast"):
        Figure(figsize=(1, 1)).savefig(pretraining / f"panel_{task}.png")
    for run, dice in DICE.items():
        write_log(tmp_path / run / "training_log.csv", ("dice", "cross_entropy"))
        (tmp_path / run / "evaluation").mkdir()
        (tmp_path / run / "evaluation/summary.json").write_text(json.dumps(evaluation(dice)))
        (tmp_path / run / "models").mkdir()
        (tmp_path / run / "models/model.pt").touch()

    (tmp_path / ".stages").mkdir()
    for number, (name, seconds) in enumerate({"data": 9.5, "pretrain": 100.0, "finetune": 130.0}.items()):
        record = {
            "title": f"Stage {name}",
            "seconds": seconds,
            "finished": f"2026-01-01 10:0{number}:00",
            "key": {"command": ["-m", "demo.thing", "--out", "a folder"]},
            "outputs": {},
        }
        (tmp_path / f".stages/{name}.json").write_text(json.dumps(record))
    (tmp_path / ".stages/report.begun.json").write_text(json.dumps({"key": {}, "seconds": 1.0}))
    return tmp_path


def words(html):
    """The visible text with single spaces."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def pictures(html, kind):
    return [base64.b64decode(content) for content in re.findall(rf'src="data:{kind};base64,([^"]+)"', html)]


def test_report_is_one_file_that_needs_nothing_else(out):
    report = write_report(out)
    html = report.read_text(encoding="utf-8")

    assert report == out / "report.html"
    assert "<script" not in html and "http" not in re.sub(r"base64,[^\"]+", "", html)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', html))
    assert len(html) < 3_000_000
    assert [path.name for path in out.glob(".*.html")] == []


def test_report_shows_the_scores_of_all_runs(out):
    text = words(write_report(out).read_text(encoding="utf-8"))

    assert "liver 0.910 0.455 0.830 0.415 0.120 0.060" in text
    assert "left kidney 0.620 0.310 0.410 0.205 – –" in text
    assert "mean 0.765 0.383 0.620 0.310 0.120 0.060" in text
    assert "within 4 mm" in text


def test_report_says_what_was_done_on_what(out):
    text = words(write_report(out).read_text(encoding="utf-8"))

    assert "on 7 scans without labels for 15 steps" in text
    assert "fine-tuned as Swin UNETR on 2 labelled scans for 15 steps" in text
    assert "no evidence of a gain on real patients" in text
    assert "75% of the views" in text and "18.2 dB" in text


def test_report_lists_times_and_commands_in_order(out):
    text = words(write_report(out).read_text(encoding="utf-8"))

    assert "Stage data 0:10 Stage pretrain 1:40 Stage finetune 2:10 total 4:00" in text
    assert "python -m demo.thing --out &#39;a folder&#39;" in text
    assert f"mlflow ui --backend-store-uri sqlite:///{out.resolve().as_posix()}/mlruns.db" in text


def test_report_links_only_what_exists(out):
    html = write_report(out).read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]+)"', html)

    assert "from_scratch/models/model.pt" in links
    assert "swin_unetr_pretrain/models/encoder.pt" not in links
    assert all((out / link).exists() for link in links)


def test_report_holds_the_panels_unchanged_and_the_curves_as_vectors(out):
    html = write_report(out).read_text(encoding="utf-8")
    panels, curves = pictures(html, "image/png"), pictures(html, r"image/svg\+xml")

    for task in ("inpainting", "rotation", "contrast"):
        assert (out / f"swin_unetr_pretrain/panel_{task}.png").read_bytes() in panels
    assert len(panels) == 4  # with the overlay
    assert len(curves) == 4 + 1 + 1  # sum and three tasks, fine-tuning, bars
    assert all(b"<svg" in curve for curve in curves)


def test_report_draws_the_mask_of_the_test_scan(out):
    def overlay():
        return imread(io.BytesIO(max(pictures(write_report(out).read_text(encoding="utf-8"), "image/png"), key=len)))

    before = overlay()
    mask = out / "segmentation/img0004_seg.nii.gz"
    image = nib.load(mask)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), mask)
    after = overlay()

    changed = np.argwhere((before != after).any(-1))[:, 0]
    assert len(changed) and changed.max() < len(before) / 2  # only the prediction's row changed, not the reference's


def test_same_files_give_the_same_report(out):
    assert write_report(out).read_bytes() == write_report(out).read_bytes()


def test_missing_file_is_named(out, capsys):
    (out / "from_scratch/evaluation/summary.json").unlink()
    with pytest.raises(InputError, match="from_scratch/evaluation/summary.json is missing"):
        write_report(out)
    assert main(["--out", str(out)]) == 1
    assert "summary.json is missing. Run the demo to its end" in capsys.readouterr().err


def test_missing_mask_is_named(out):
    (out / "segmentation/img0004_seg.nii.gz").unlink()
    with pytest.raises(InputError, match="img0004_seg.nii.gz is missing"):
        write_report(out)


def test_curves_are_the_logged_values():
    rows = [{"step": 5.0, "loss": 3.0}, {"step": 10.0, "loss": 2.0}, {"step": 15.0, "loss": 1.5}]
    figure = curve_figure({"one": rows, "two": rows[:2]}, "loss", {"one": "red", "two": "blue"})
    lines = figure.axes[0].get_lines()

    assert lines[0].get_xydata().tolist() == [[5, 3], [10, 2], [15, 1.5]]
    assert lines[1].get_xydata().tolist() == [[5, 3], [10, 2]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]


def test_bars_are_the_dice_of_each_organ_and_run():
    figure = dice_figure({run: evaluation(dice) for run, dice in DICE.items()})
    widths = [[bar.get_width() for bar in container] for container in figure.axes[0].containers]

    np.testing.assert_allclose(np.array(widths), [[0.91, 0.62], [0.83, 0.41], [0.12, np.nan]])
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["liver", "left kidney"]


def test_summary_prints_scores_paths_and_time(out):
    screen = io.StringIO()
    print_summary(out, Console(file=screen, width=100))
    lines = [" ".join(re.findall(r"[^\s│┃]+", line)) for line in screen.getvalue().splitlines()]

    assert "liver 0.910 0.455 0.830 0.415 0.120 0.060" in lines
    assert "left kidney 0.620 0.310 0.410 0.205 – –" in lines
    assert "mean 0.765 0.383 0.620 0.310 0.120 0.060" in lines
    assert f"report {out}/report.html" in lines
    assert "compute time 4:00" in lines
    assert any(line.startswith("tracked runs mlflow ui --backend-store-uri sqlite:///") for line in lines)


def test_summary_fits_a_terminal_of_80_columns(out):
    screen = io.StringIO()
    print_summary(out, Console(file=screen, width=80))
    table = [line for line in screen.getvalue().splitlines() if line[:1] in "┃│┏┡├└"]
    assert table and all("…" not in line for line in table)
    assert all(title.split()[0] in screen.getvalue() for title in RUNS.values())


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_score_without_a_value_is_a_dash():
    assert (score_text(0.5), score_text(None)) == ("0.500", "–")


def test_report_says_what_was_not_learnt_in_red(out):
    html = write_report(out).read_text(encoding="utf-8")
    assert '<li class="failed">contrast: NOT LEARNT, as one</li>' in html
    assert "<li>rotation: learnt, 75% right</li>" in html
    assert ".failed { color: #c0392b" in html
