# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The patients and the task of a study: from the user's data set or made up, with the row given, chosen or proposed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from bundles.common.data.case_names import case_names
from bundles.common.data.data_list import first_file, image_files
from bundles.common.errors import InputError
from bundles.common.files import write_text
from bundles.segmentation.tasks.proposal import proposed_row
from bundles.segmentation.tasks.tasks import check_dataset, choose_task
from tools.synthetic_ct import write_dataset

from .study import BUNDLES, SEGMENT, Study
from .subsets import Parts

MARK, FINGERPRINT, PRESENT, TASK = ".study", ".data.json", ".present_labels.json", "task.yaml"
TASKS = BUNDLES / SEGMENT / "configs/tasks.yaml"


def prepare_folder(out: Path, study: str) -> None:
    """Make the folder of a study; git is told to leave it alone.

    Raises:
        InputError: it holds another study, or something else.
    """
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise InputError(f"--out {out} cannot be a folder: {above} is a file. Choose another --out.")
    mark = out / MARK
    if mark.exists():
        if (held := mark.read_text(encoding="utf-8").strip()) != study:
            raise InputError(f"{out} holds the study {held}, not {study}: choose another folder by --out.")
        return
    # hidden files may be of another process that makes the same folder now
    if out.is_dir() and any(path.name[0] != "." for path in out.iterdir()):
        raise InputError(f"{out} holds files that no study made: choose an empty or a new folder by --out.")
    write_text(out / ".gitignore", "*\n")
    write_text(mark, f"{study}\n")


def _labels_of_row(study: Study) -> dict[str, str]:
    """The labels of the row that a study has or names."""
    labels = (study.row or choose_task(task=study.task, file=str(TASKS), preset=study.preset)).get("labels")
    return {str(value): name for value, name in labels.items()} if isinstance(labels, Mapping) else {}


def absent_labels(
    cases: Mapping[str, Mapping[str, Any]], *, labels: Mapping[str, str], remember: Path | None = None
) -> dict[str, list[str]]:
    """The names of the labels that each case's label file does not hold, of cases that lack one.

    Args:
        cases: name to case, with its ``label`` file.
        labels: value to name, background included.
        remember: file of what was found before, by case and size of the file; reading a hundred large CTs' labels takes minutes.

    Raises:
        InputError: a label file cannot be read.
    """
    known = read_json(remember, "it is made again") if remember and remember.is_file() else {}
    present = {}
    for name, case in cases.items():
        try:
            key = f"{name}, {Path(case['label']).stat().st_size} bytes"
            values = known.get(key) or np.unique(np.asarray(nib.load(case["label"]).dataobj)).tolist()
        except Exception as error:  # a truncated gzip, a header of another format, a file that is not there
            raise InputError(
                f"{case['label']} cannot be read ({error}). Restore it, or take it out of the list."
            ) from None
        if wrong := [value for value in values if not float(value).is_integer()]:
            raise InputError(
                f"{case['label']} holds {wrong[0]}, which is no label: whole numbers are. Mend it, or take it out of the list."
            )
        known[key], present[name] = values, {int(value) for value in values}
    if remember:
        write_text(remember, json.dumps(known, indent=1) + "\n")
    names = {int(value): name for value, name in labels.items() if int(value)}
    absent = {case: [name for value, name in names.items() if value not in held] for case, held in present.items()}
    return {case: lacking for case, lacking in absent.items() if lacking}


def _synthetic(folder: Path, counts: Mapping[str, int]) -> Path:
    """Synthetic patients as one data set with an unlabelled section."""
    lists = write_dataset(folder, test=0, shuffled=False, **counts)
    labelled, unlabelled = (json.loads(path.read_text()) for path in (lists.labelled, lists.unlabelled))
    scans = [
        {"image": f"../unlabelled/{each['image'] if isinstance(each, Mapping) else each}"}
        for section in ("training", "validation")
        for each in unlabelled.get(section, [])
    ]
    whole = lists.labelled.with_name("study.json")
    text = json.dumps({**labelled, "unlabelled": scans}, indent=1) + "\n"
    if not whole.exists() or whole.read_text() != text:
        write_text(whole, text)
    return whole


def fingerprint(parts: Parts) -> dict[str, dict[str, list[int]]]:
    """What tells data sets apart wherever they lie: names of cases, and sizes in bytes of their files.

    Tuning patients count as training: how many are set apart is the study's choice.
    """
    images = {first_file(scan): scan for scan in parts.unlabelled}
    sections = {
        "training": {**parts.training, **parts.tuning},
        "validation": parts.validation,
        "unlabelled": {name: images[file] for file, name in case_names(images).items()},
    }
    return {
        section: {name: [Path(file).stat().st_size for file in _files(cases[name])] for name in sorted(cases)}
        for section, cases in sections.items()
    }


def _files(case: Mapping[str, Any]) -> list[str]:
    return image_files(case) + ([case["label"]] if "label" in case else [])


def _check_fingerprint(now: Mapping[str, Mapping[str, list[int]]], out: Path, data: Path) -> None:
    """Refuse data that a study's folder was not made of. One without a fingerprint is new, or of an earlier version."""
    path = out / FINGERPRINT
    if not path.exists():
        return
    was = read_json(path, "it is made again of the data that are given then")
    for section in now:
        before, after = was.get(section, {}), now[section]
        if changed := [name for name in sorted({**before, **after}) if before.get(name) != after.get(name)]:
            name = changed[0]
            how = "is new" if name not in before else "is gone" if name not in after else "has files of other sizes"
            raise InputError(
                f"{out} was made of other data than {data}: {len(changed)} {section} cases differ; {name} {how}. Its row of the task and its finished "
                "runs are of those data: choose another --out, restore the data, or remove the folder to begin anew."
            )


def _row(study: Study, parts: Parts, out: Path, data: Path) -> tuple[str | Path, Mapping[str, Any]]:
    """What ``--task`` is, and the row with the preset's values; of a row that is refused nothing is kept."""

    def checked(task: str | Path) -> Mapping[str, Any]:
        row = choose_task(task=str(task), file=str(TASKS), preset=study.preset)
        # the bundles see the plan's lists, which have the row's labels: the user's own is compared here
        check_dataset(dataset_dir=str(data), data_list=None, row=row, file=str(TASKS))
        return row

    if study.task:
        return study.task, checked(study.task)
    kept = out / TASK
    if study.row:
        text = yaml.safe_dump({study.name: dict(study.row)}, sort_keys=False)
        with TemporaryDirectory() as folder, _named(given := Path(folder, TASK), f"{study.source}, row"):
            given.write_text(text, encoding="utf-8")
            row = checked(given)
        _keep(text, kept, study)
        return Path(TASK), row
    if not kept.exists():
        listed = {"name": study.name, "labels": parts.labels, "modality": parts.modality}
        listed["training"] = list(parts.training.values())
        proposal = out / "lists/proposal.json"
        write_text(proposal, json.dumps(listed, indent=1) + "\n")
        with _named(proposal, str(data if data.is_file() else data / "dataset.json")):
            proposed_row(proposal, output_dir=out)
    return Path(TASK), checked(kept)


@contextmanager
def _named(generated: Path, given: str) -> Iterator[None]:
    """Let errors about a file that was made from the user's name the user's."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(generated), given)) from None


def _keep(text: str, path: Path, study: Study) -> None:
    """Write the study's row where the bundles read it. While nothing was run by another, that one may be replaced."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    runs = sorted(path.parent.glob("runs/*"))
    if path.exists() and runs:
        raise InputError(
            f"{study.source}: row is not the one that {runs[0]} was made by, which stands in {path}. Take the change back, or choose another --out."
        )
    write_text(path, text)


def read_json(path: Path, then: str) -> Any:
    """Content of a file that a study has written; ``then``: what happens once it is removed.

    Raises:
        InputError: it is empty or torn, as a full disk or a power cut may leave it.
        FileNotFoundError: it is not there.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is no JSON ({error}; {path.stat().st_size} bytes): it was torn, by a full disk or a power cut. Remove it: {then}."
        ) from None
