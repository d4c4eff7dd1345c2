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
from matplotlib.image import imread, imsave
from rich.console import Console

from bundles.common.errors import InputError
from bundles.segmentation.results.overlay import organ_colours
from bundles.segmentation.results.scores_table import write_scores
from demo.findings import Comparison, compare, interval_of_mean
from demo.report import comparison_figure, curve_figure, halves, main, organ_figure, write_report
from demo.summary import RUNS, clock, print_summary, score_text

NAN = float("nan")
ORGANS = ("liver", "left_kidney")
CASES = ("img0004", "img0005", "img0006")
# Dice of each run: a row for each patient, a column for each organ.
DICE = {
    "swin_unetr_btcv_seg": [(0.90, 0.61), (0.91, 0.62), (0.92, 0.63)],
    "from_scratch": [(0.85, 0.43), (0.83, 0.41), (0.81, 0.39)],
    "shuffled_labels": [(0.12, NAN)] * 3,
}


def rows_of(dice):
    return [
        {"case": case, "label": organ, "dice": value, "nsd": value / 2, "hd95": 10.0}
        for case, values in zip(CASES, dice, strict=True)
        for organ, value in zip(ORGANS, values, strict=True)
    ]


def write_evaluation(out, run, dice):
    """Write the files of an evaluation: rows of Dice for each patient."""
    folder = out / run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    write_scores(rows_of(dice), folder / "scores.csv")
    (folder / "summary.json").write_text(json.dumps(evaluation(np.mean(dice, axis=0).tolist())))


def write_validation(out, **changes):
    """Write the validation of a pre-training that learnt all of its tasks; by its name each verdict can be changed."""
    report = {"views": 12, "loss": 2.0, "rotation_accuracy": 0.75, "contrast_top1": 0.5, "masked_psnr": 18.25}
    report |= {"contrast_without_learning": float(np.log(7)), "masked_psnr_of_a_constant": 15.24}
    verdicts = {task: {"learnt": True, "because": "as seen"} for task in ("rotation", "contrast", "inpainting")}
    verdicts |= {task: {"learnt": False, "because": because} for task, because in changes.items()}
    (out / "swin_unetr_pretrain/validation.json").write_text(json.dumps(report | {"verdicts": verdicts}))


def html_of(out):
    return write_report(out).read_text(encoding="utf-8")


def evaluation(dice):
    labels = {
        organ: {
            "dice": {"mean": None if np.isnan(value) else value, "std": 0.0, "n": 3},
            "nsd": {"mean": None if np.isnan(value) else value / 2, "std": 0.0, "n": 3},
        }
        for organ, value in zip(ORGANS, dice, strict=True)
    }
    known = [value for value in dice if not np.isnan(value)]
    mean = sum(known) / len(known)
    tolerance = {"liver": 4.0, "left_kidney": 4.0}
    return {
        "labels": labels,
        "mean_dice": mean,
        "mean_nsd": mean / 2,
        "tolerance": tolerance,
        "cases": list(CASES),
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
    """A made-up finished demo: two organs and three test scans, stored with a flipped left-right axis like most CT."""
    labelled, segmentation = tmp_path / "data/labelled", tmp_path / "segmentation"
    for folder in (labelled / "imagesTs", labelled / "labelsTs", tmp_path / "data/unlabelled", segmentation):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth = np.zeros((24, 20, 12), np.uint8)
    truth[2:9, 5:12, 3:9] = 1
    truth[14:20, 5:12, 3:9] = 2
    affine = np.diag((-4.0, 4.0, 5.0, 1.0))
    cases = []
    for case in CASES:
        image, label = f"./imagesTs/{case}.nii.gz", f"./labelsTs/{case.replace('img', 'label')}.nii.gz"
        cases.append({"image": image, "label": label})
        nib.save(nib.Nifti1Image(rng.integers(-200, 300, truth.shape, np.int16), affine), labelled / image)
        nib.save(nib.Nifti1Image(truth, affine), labelled / label)
        nib.save(nib.Nifti1Image(np.roll(truth, 1, 0), affine), segmentation / f"{case}_seg.nii.gz")
    case = cases[0]
    lists = {
        "labelled": {
            "labels": {"0": "background", "1": "liver", "2": "left_kidney"},
            "training": [case, case],
            "validation": [case],
            "test": cases,
        },
        "unlabelled": {"training": [case] * 6, "validation": [case]},
    }
    for name, content in lists.items():
        (tmp_path / "data" / name / "dataset.json").write_text(json.dumps(content))

    pretraining = tmp_path / "swin_unetr_pretrain"
    write_log(pretraining / "training_log.csv", ("inpainting", "contrast", "rotation"))
    write_validation(tmp_path)
    for task in ("inpainting", "rotation", "contrast"):
        Figure(figsize=(1, 1)).savefig(pretraining / f"panel_{task}.png")
    for run, dice in DICE.items():
        write_log(tmp_path / run / "training_log.csv", ("dice", "cross_entropy"))
        write_evaluation(tmp_path, run, dice)
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
    text = words(html_of(out))

    assert "liver 0.910 0.455 0.830 0.415 0.120 0.060" in text
    assert "left kidney 0.620 0.310 0.410 0.205 – –" in text
    assert "mean 0.765 0.383 0.620 0.310 0.120 0.060" in text
    assert "within 4 mm" in text


def test_report_says_what_was_done_on_what(out):
    text = words(html_of(out))

    assert "on 7 scans without labels for 15 steps" in text
    assert "fine-tuned as Swin UNETR on 2 labelled scans for 15 steps" in text
    assert "no evidence of a gain on real patients" in text
    assert "evaluated on 3 patients that it had not seen" in text


def test_report_lists_times_and_commands_in_order(out):
    text = words(html_of(out))

    assert "Stage data 0:10 Stage pretrain 1:40 Stage finetune 2:10 total 4:00" in text
    assert "python -m demo.thing --out &#39;a folder&#39;" in text
    assert f"mlflow ui --backend-store-uri sqlite:///{out.resolve().as_posix()}/mlruns.db" in text


def test_report_links_only_what_exists(out):
    html = html_of(out)
    links = re.findall(r'href="([^"]+)"', html)

    assert "from_scratch/models/model.pt" in links
    assert "swin_unetr_pretrain/models/encoder.pt" not in links
    assert all((out / link).exists() for link in links)


def test_report_holds_readable_panels_and_the_curves_as_vectors(out):
    tile = np.ones((20, 20, 3))
    tile[2:18, 2:18] = np.linspace(0, 0.9, 16)[:, None]
    for task in ("inpainting", "rotation", "contrast"):
        imsave(out / f"swin_unetr_pretrain/panel_{task}.png", np.tile(tile, (2, 2, 1)))
    html = html_of(out)
    panels, curves = pictures(html, "image/png"), pictures(html, r"image/svg\+xml")

    sizes = [imread(io.BytesIO(panel)).shape[:2] for panel in panels[len(CASES) :]]
    assert sizes == [(20, 40), (40, 40), (40, 20), (40, 20)]  # a half, the whole, two halves
    assert len(panels) == len(CASES) + 4 and len(curves) == 3 + 1 + 1 + 1  # three tasks, difference, losses, organs
    assert all(b"<svg" in curve for curve in curves)


@pytest.mark.parametrize("axis", [0, 1])
def test_picture_is_cut_at_the_blank_line_nearest_to_its_middle(axis):
    picture = np.zeros((10, 10, 4))
    lines = np.moveaxis(picture, axis, 0)
    lines[[0, 6, 9]] = 1
    assert [half.shape[axis] for half in halves(picture, axis=axis)] == [6, 4]
    lines[:] = 0
    assert len(halves(picture, axis=axis)) == 1


def overlays(html):
    """The pictures of the test patients by name, in their order."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)" alt="Predicted [^"]*, patient (\w+)"', html)
    return {name: imread(io.BytesIO(base64.b64decode(content))) for content, name in found}


@pytest.mark.parametrize("case", CASES)
def test_report_draws_the_mask_of_each_test_scan(out, case):
    before = overlays(html_of(out))
    mask = out / f"segmentation/{case}_seg.nii.gz"
    image = nib.load(mask)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), mask)
    after = overlays(html_of(out))

    assert [name for name in before if not np.array_equal(before[name], after[name])] == [case]
    changed = np.argwhere((before[case] != after[case]).any(-1))[:, 0]
    assert len(changed) and changed.max() < len(before[case]) / 2  # only the prediction's row, not the reference's


def test_patient_of_median_dice_is_shown_first(out):
    assert list(overlays(html_of(out))) == ["img0005", "img0004", "img0006"]
    write_evaluation(out, "swin_unetr_btcv_seg", [(0.5, 0.5), (0.9, 0.9), (0.7, 0.7)])
    assert list(overlays(html_of(out))) == ["img0006", "img0004", "img0005"]
    assert "Patient img0006, mean Dice 0.700: the middle one of 3 patients by that score" in words(html_of(out))


def test_legend_names_each_organ_with_the_colour_of_the_picture(out):
    found = re.findall(r'<li><i style="background: (#\w{6})"></i><span>([^<]+)</span></li>', html_of(out))
    colours = ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in organ_colours([1, 2]).values()]
    assert found == list(zip(colours, ["liver", "left kidney"], strict=True))


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


def test_dots_are_the_dice_of_each_patient_organ_and_run():
    figure = organ_figure({run: rows_of(dice) for run, dice in DICE.items()})
    dots, means = figure.axes[0].collections[::2], figure.axes[0].collections[1::2]

    for place, (run, dice) in enumerate(DICE.items()):
        seen = np.ma.filled(dots[place].get_offsets(), np.nan)
        np.testing.assert_allclose(seen[:, 0], np.ravel(dice), err_msg=run)
        drawn = ~np.isnan(seen[:, 0])
        np.testing.assert_allclose(seen[drawn, 1], np.array([0, 1] * 3)[drawn] + 0.25 * (place - 1))
    assert np.ma.filled(means[0].get_offsets(), np.nan)[:, 0] == pytest.approx([0.91, 0.62])
    assert np.ma.filled(means[2].get_offsets(), np.nan)[:, 0] == pytest.approx([0.12, np.nan], nan_ok=True)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["liver", "left kidney"]


def test_difference_is_drawn_for_each_patient_with_its_interval():
    found = Comparison(("a", "b"), (0.9, 0.7), (0.6, 0.8), difference=0.1, interval=(-0.2, 0.4))
    axes = comparison_figure(found).axes[0]
    zero, interval, mean = axes.get_lines()

    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.3, 0], [-0.1, 1]])
    assert (zero.get_xdata(), tuple(interval.get_xdata()), list(mean.get_xdata())) == ([0, 0], (-0.2, 0.4), [0.1])
    assert axes.get_xlim()[0] < -0.2 and axes.get_xlim()[1] > 0.4


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


def boxes(html):
    """The text of the red boxes."""
    found = re.findall(r'<div class="(?:card )?alarm">(.*?)</div>', html, flags=re.DOTALL)
    return [words(box) for box in found]


def test_all_tasks_learnt_need_no_red_box(out):
    html = html_of(out)
    assert boxes(html) == []
    assert "Pre-training learnt all of its tasks: rotation, contrast and inpainting." in words(html)


def test_what_was_not_learnt_is_in_a_red_box(out):
    write_validation(out, contrast="the loss is that of equal embeddings")
    html = html_of(out)
    summary, reason, card = boxes(html)

    assert summary.startswith("Not learnt: contrast. Pre-training did not learn contrast.")
    assert "It learnt rotation and inpainting." in summary and "If a task is not learnt" in summary
    assert reason == "Find the partner (contrast): NOT LEARNT. The loss is that of equal embeddings."
    assert "NOT LEARNT : the loss is that of equal embeddings" in card
    assert ".alarm { background: #fdecea; border: 2px solid #c0392b" in html


def test_pretraining_that_learnt_nothing_is_said_so(out):
    write_validation(out, rotation="by chance", contrast="as one", inpainting="grey")
    found = boxes(html_of(out))
    assert "Pre-training learnt nothing" in found[0] and len(found) == 1 + 3 + 3


def test_proxy_tasks_stand_beside_what_chance_gives(out):
    text = words(html_of(out))
    assert "75% turns told (25% by chance)" in text
    assert "50% partners found (14% by chance)" in text  # one of seven
    assert "50% squared error left in the holes (100% with the best plain grey)" in text  # 3 dB


def test_interval_that_excludes_zero_names_the_better_start(out):
    # differences 0.115, 0.145 and 0.175: 0.145 with t 4.303 x 0.03 / sqrt(3)
    text = words(html_of(out))
    sentence = "On these 3 patients the pre-trained start scored higher than a random one: the mean Dice differs by "
    assert f"{sentence}+0.145 (95% interval +0.070 to +0.220)" in text
    assert "cannot tell" not in text and "another seed may give another difference" in text


def test_interval_that_spans_zero_is_said_in_words(out):
    write_evaluation(out, "from_scratch", [(0.80, 0.31), (0.91, 0.62), (0.92, 0.66)])
    html = html_of(out)
    assert words(html).count("The demo cannot tell the pre-trained start from a random one") == 2
    assert "and this interval spans zero" in words(html) and "scored higher" not in words(html)
    assert '<div class="finding open"><strong>Does a pre-trained start help?' in html


def test_page_has_no_card_with_the_score_of_a_run(out):
    cards = re.findall(r'<div class="card[^"]*">(.*?)</div>', html_of(out), flags=re.DOTALL)
    assert len(cards) == 3 and not any("Dice" in card for card in cards)


def test_control_that_scores_as_high_is_in_a_red_box(out):
    write_evaluation(out, "shuffled_labels", DICE["from_scratch"])
    assert boxes(html_of(out))[0].startswith("Do the labels matter? The control failed: true labels gain +0.000")


def test_one_test_patient_is_no_failed_control(out):
    labelled = json.loads((out / "data/labelled/dataset.json").read_text())
    (out / "data/labelled/dataset.json").write_text(json.dumps(labelled | {"test": labelled["test"][:1]}))
    for run, dice in DICE.items():
        write_scores(rows_of(dice)[:2], out / run / "evaluation/scores.csv")
    html = html_of(out)
    assert boxes(html) == [] and "the middle one" not in html
    assert "1 patient cannot give an interval." in words(html) and "95% interval – – –" in words(html)


def test_missed_organ_is_named(out):
    nothing_missed = words(html_of(out))
    assert "None: every organ was found in every patient." in nothing_missed
    assert "not found in patients" not in nothing_missed  # no empty columns
    write_evaluation(out, "swin_unetr_btcv_seg", [(0.90, 0.09), (0.91, 0.11), (0.92, 0.0)])
    write_evaluation(out, "from_scratch", [(0.05, 0.6)] * 3)
    text = words(html_of(out))

    assert "Which organs were missed? left kidney: not found in 2 of 3 patients." in text
    assert "left kidney not found in 2 of 3 The other test patients" in text  # the legend
    assert "not found in patients organ Dice NSD Dice NSD Dice NSD encoder scratch" in text
    assert "liver 0.910 0.455 0.050 0.025 0.120 0.060 3 of 3" in text
    assert "left kidney 0.067 0.033 0.600 0.300 – – 2 of 3" in text


def test_means_have_intervals_over_patients(out):
    write_evaluation(out, "from_scratch", [(0.5, 0.3), (0.6, 0.4), (0.7, 0.5)])
    low, high = interval_of_mean([0.4, 0.5, 0.6])
    assert f"95% interval 0.74 to 0.79 0.37 to 0.39 {low:.2f} to {high:.2f}" in words(html_of(out))


def test_summary_says_what_was_learnt_compared_and_missed(out):
    write_validation(out, contrast="as one")
    write_evaluation(out, "swin_unetr_btcv_seg", [(0.90, 0.0), (0.80, 0.5), (0.6, 0.4)])
    screen = io.StringIO()
    print_summary(out, Console(file=screen, width=100))
    printed = " ".join(screen.getvalue().split())

    assert "Scores on 3 patients" in printed
    assert "Pre-training did not learn contrast. It learnt rotation and inpainting." in printed
    assert "The demo cannot tell the pre-trained start from a random one: over 3 patients" in printed
    assert "Missed, left kidney: not found in 1 of 3 patients." in printed


def test_comparison_of_the_files_is_that_of_the_scores(out):
    found = compare(rows_of(DICE["swin_unetr_btcv_seg"]), rows_of(DICE["from_scratch"]))
    assert found.cases == CASES and found.difference == pytest.approx(0.145)
