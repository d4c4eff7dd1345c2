# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Plan the runs of a cross-validation: folds of every task and arm, their table, the ensemble, the leaderboard's archive."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bundles.common.data.list_forms.list_file import image_files, parse_data_list
from bundles.common.errors import InputError
from bundles.common.files import file_hash, walk_once, write_text
from bundles.segmentation.tasks.proposal import proposed_row
from bundles.segmentation.tasks.tasks import check_dataset, choose_task
from evidence.study.study import BUNDLES, PRETRAIN, SEGMENT, preset_values, suggestion
from tools.bundle_runs import LISTS, Command, Run, first_difference, mark_of, read_json, write_plan

from .folds import OWN, PRETRAINING, FoldArm, Folds, read_folds

MARK, CONTENTS = ".folds", ".data.json"  # in the output folder: name, and files of the data
CONTENTS_AGAIN = "it is written again for the data that you pass next"
TASKS = BUNDLES / SEGMENT / "configs/tasks.yaml"
TABLE, SUBMISSION = "table", "submission"
PREPARE_MINUTES = 120.0
INFERENCE_MINUTES = 120.0
YAML = (".yaml", ".yml")


def plan_folds(path: Path, *, data: Path | None, out: Path) -> None:
    """Read a cross-validation and its data, and write what is to be run.

    Args:
        path: its YAML file.
        data: folder of the data, instead of that in the file.
        out: output folder.

    Raises:
        InputError: the file or the data are wrong, ``out`` belongs to something else, or a run in it was made with
            other settings.
    """
    folds = read_folds(path)
    if data is None and folds.data is None:
        raise InputError(f"{folds.source}: data is missing. Add it, or pass --data DIR.")
    data = (data or Path(folds.data).expanduser()).resolve()
    tasks = tasks_of(folds, data)
    _check_folder(out, folds.name)
    contents = {task: files_of(folder) for task, folder in tasks.items()}
    _check_contents(contents, out)
    rows = {task: row_of(folds, task, folder, out) for task, folder in tasks.items()}
    runs = runs_of(folds, tasks, rows, out)
    ends = {kind: [run.name for run in runs if run.kind == kind] for kind in ("finetuning", "inference")}
    planned = [(run, _minutes(run, folds)) for run in runs]
    if folds.scans is not None:
        _segment_new_scans(Path(folds.scans).expanduser(), [out / "runs" / name for name in ends["inference"]])
    write_plan(out, workflow="folds", name=folds.name, source=folds.source, runs=planned, ends=ends)
    saved = read_json(out / CONTENTS, CONTENTS_AGAIN) if (out / CONTENTS).is_file() else {}
    write_text(out / CONTENTS, json.dumps({**saved, **contents}, indent=1) + "\n")
    write_text(out / ".gitignore", "*\n")
    write_text(out / MARK, f"{folds.name}\n")


def _segment_new_scans(scans: Path, runs: Sequence[Path]) -> None:
    """Let inferences that have ended continue if files were added to the scans since, or changed."""
    ended = {run: mark for run in runs if (mark := mark_of(run, "infer")).exists()}
    if not ended:
        return  # large folders take long to look through
    newest = max((file.stat().st_ctime for file in _all_below(scans) if file.exists()), default=0.0)  # mtime may be old
    for run, mark in ended.items():
        if newest > mark.stat().st_mtime:
            mark.unlink()
            print(f"{run.name}: {scans} has new files since its masks were made; it goes on with these.")


def _all_below(place: Path) -> Iterator[Path]:
    """Yield a file, or a folder with all files and folders below it, in linked folders as well."""
    yield place
    for folder, folders, files in walk_once(place):
        yield from (Path(folder, name) for name in (*folders, *files))


def tasks_of(folds: Folds, data: Path) -> dict[str, Path]:
    """Return task to the folder of its data.

    Args:
        folds: the cross-validation.
        data: folder of the data.

    Raises:
        InputError: a folder does not exist or a task is not one of the Decathlon.
    """
    if not data.is_dir():
        raise InputError(f"Data {data} is not a folder. Correct the path.")
    known = list(_table())
    if folds.task is not None:
        if folds.task != OWN and Path(folds.task).suffix not in YAML and folds.task not in known:
            raise InputError(
                f"{folds.source}: task {folds.task} is not a task of the Decathlon. {suggestion(folds.task, known)}; for "
                "your own data say own, or a file with a row."
            )
        if not (data / "dataset.json").is_file():
            below = next((path.parent for path in sorted(data.glob("*/dataset.json"))), None)
            hint = f"Pass {below}, which has one" if below else "Pass the folder of a data set in MSD form"
            raise InputError(f"Data {data} has no dataset.json. {hint}.")
        if folds.task == OWN:
            return {folds.name: data}
        return {Path(folds.task).stem if Path(folds.task).suffix in YAML else folds.task: data}  # names of folders
    for task in [*(folds.tasks or ()), *folds.training_of]:
        if task not in known:
            raise InputError(f"{folds.source}: {task} is not a task of the Decathlon. {suggestion(task, known)}.")
    found = [task for task in known if (data / task / "dataset.json").is_file()]
    if missing := [task for task in folds.tasks or () if task not in found]:
        raise InputError(f"{data / missing[0]} has no dataset.json. Unpack the task there, or remove it from tasks.")
    if not found:
        raise InputError(
            f"{data} has no folder of a task, such as {known[0]}/dataset.json. Pass the folder above them."
        )
    return {task: data / task for task in folds.tasks or found}


def row_of(folds: Folds, task: str, data: Path, out: Path) -> tuple[str | Path, Mapping[str, Any]]:
    """Return the value of ``--task`` and the row of a task; one's own data get a proposed row, ``OUT/task.yaml``.

    Raises:
        InputError: there is no such row, or it does not fit the data.
    """
    word, file = task, None
    if folds.task == OWN:
        word, file = Path("task.yaml"), out / "task.yaml"
        if not file.is_file():
            proposed_row(data / "dataset.json", output_dir=out)
    elif folds.task and Path(folds.task).suffix in YAML:
        word = file = Path(folds.task).expanduser().resolve()
    row = choose_task(task=str(file or task), file=str(TASKS), preset=folds.preset)
    check_dataset(dataset_dir=str(data), data_list=None, row=row, file=str(TASKS))
    return word, row


def runs_of(
    folds: Folds, tasks: Mapping[str, Path], rows: Mapping[str, tuple[str | Path, Mapping[str, Any]]], out: Path
) -> list[Run]:
    """Return all runs of a cross-validation.

    Args:
        folds: the cross-validation.
        tasks: task to folder, see `tasks_of`.
        rows: task to row, see `row_of`.
        out: output folder.
    """
    before = _pretraining(folds) if any(arm.encoder == PRETRAINING for arm in folds.arms.values()) else []
    trained, ensembles = [], []
    for task, data in tasks.items():
        of_task: dict[str, list[Run]] = {}
        for arm, own in folds.arms.items():
            if own.modalities is not None and rows[task][1]["modality"] not in own.modalities:
                continue
            of_task[arm] = [_fold(folds, task, arm, own, fold, data, rows[task], before) for fold in range(folds.folds)]
        trained += [run for of_arm in of_task.values() for run in of_arm]
        arm = next((arm for arm in folds.ensemble if arm in of_task), None)
        if arm is not None and folds.scans is None and not _has_test(data):
            print(
                f"No masks of an ensemble for {task}: {data / 'dataset.json'} lists no test images. Set scans in "
                f"{folds.source} to what it should segment, or ensemble: []."
            )
        elif arm is not None:
            ensembles.append(_ensemble(folds, task, arm, data, rows[task][1], of_task[arm]))
    runs = [*before, *trained, *ensembles, _table_run(trained, out)]
    if folds.submission:
        if not ensembles:
            raise InputError(f"{folds.source}: no task has test images for the submission. Remove submission.")
        runs.append(_submission(ensembles, tasks, out))
    return runs


def _pretraining(folds: Folds) -> list[Run]:
    own, runs = folds.pretraining, []
    scans = own.scans if isinstance(own.scans, str) else json.dumps(own.scans)
    preset = own.options.get("preset", "cpu" if folds.preset == "cpu" else "official")
    options: dict[str, Any] = {"preset": preset, "dataset_dir": scans}
    if own.prepare is not None:
        spacing = own.options.get("spacing", preset_values(preset).get("spacing"))  # the store has the training's
        prepare = {"source": scans, "dataset_dir": Path("runs/prepare/data"), "spacing": spacing, **own.prepare}
        runs.append(
            _run("prepare", "preparation", [_command("prepare", PRETRAIN, prepare, "data/dataset.json", (0, 3))])
        )
        options |= {"dataset_dir": prepare["dataset_dir"], "data": "store"}
    options |= {"output_dir": Path("runs/pretrain/train"), "seed": folds.seed, "resume": True, "tensorboard": False}
    command = _command("train", PRETRAIN, options | own.options, "train/models/encoder.pt")
    runs.append(_run("pretrain", "pretraining", [command], needs=[run.name for run in runs]))
    return runs


def _fold(
    folds: Folds,
    task: str,
    arm: str,
    own: FoldArm,
    fold: int,
    data: Path,
    row: tuple[str | Path, Mapping[str, Any]],
    before: list[Run],
) -> Run:
    """Return the run with training and evaluation of one fold."""
    name = f"{task}_{arm}_fold{fold}"
    encoder, needs = own.encoder and Path(own.encoder).expanduser().resolve(), []
    if own.encoder == PRETRAINING:
        encoder, needs = Path("runs/pretrain/train/models/encoder.pt"), [before[-1].name]
    train = {"task": row[0], "preset": folds.preset, "dataset_dir": data, "fold": fold, "folds": folds.folds}
    train |= {"output_dir": Path("runs", name, "train"), "seed": folds.seed, "resume": True, "tensorboard": False}
    train |= {} if encoder is None else {"pretrained_encoder": encoder}
    train |= {**folds.training, **folds.training_of.get(task, {}), **own.training}
    evaluate = {"preset": folds.preset, "dataset_dir": data, "output_dir": Path("runs", name, "evaluation")}
    evaluate |= {"pretrained_model": Path("runs", name, "train/models/model.pt"), **folds.evaluation}
    return _run(
        name,
        "finetuning",
        [
            _command("train", SEGMENT, train, "train/models/model.pt"),
            _command("evaluate", SEGMENT, evaluate, "evaluation/scores.csv", (0, 3)),
        ],
        facts={"task": task, "arm": arm, "fold": fold, "encoder": _digest(encoder) if own.encoder else None},
        row=row[1],
        needs=needs,
    )


def _ensemble(folds: Folds, task: str, arm: str, data: Path, row: Mapping[str, Any], of_arm: list[Run]) -> Run:
    """Return the run for the masks that all folds of an arm make together."""
    name = f"{task}_{arm}_ensemble"
    options = {
        "preset": folds.preset,
        "dataset_dir": Path(folds.scans).expanduser().resolve() if folds.scans else data / "dataset.json",
        "pretrained_model": Path("runs", f"{task}_{arm}_fold*", "train/models/model.pt"),
        "output_dir": Path("runs", name, "masks"),
        "resume": True,
        **folds.inference,
    }
    command = _command("infer", SEGMENT, options, "masks/volumes.csv", (0, 3), config="inference")
    return _run(name, "inference", [command], facts={"task": task, "arm": arm}, row=row, needs=[r.name for r in of_arm])


def _table_run(trained: list[Run], out: Path) -> Run:
    """Return the run for the table of all folds."""
    names = [run.name for run in trained]  # not what else lies in the folder, such as an arm that was removed
    content = {"evaluations": [str(out / "runs" / name / "evaluation") for name in names]}
    options = {"args_file": Path(LISTS, "results.json"), "output_dir": Path("results")}
    command = _command("results", SEGMENT, options, "../../results/results.md")
    return _run(TABLE, "table", [command], lists={"results": content}, needs=names)


def _submission(ensembles: list[Run], tasks: Mapping[str, Path], out: Path) -> Run:
    """Return the run for the archive for the leaderboard. The bundle reads folders of several tasks from a file."""
    content = {
        "tasks": {run.facts["task"]: str(out / "runs" / run.name / "masks") for run in ensembles},
        "data_dirs": {run.facts["task"]: str(tasks[run.facts["task"]]) for run in ensembles},
    }
    options = {"args_file": Path(LISTS, "submit.json"), "archive": Path("submission.zip")}
    command = _command("submit", SEGMENT, options, "../../submission.zip")
    return _run(SUBMISSION, "submission", [command], lists={"submit": content}, needs=[run.name for run in ensembles])


def _command(
    name: str,
    bundle: str,
    options: Mapping[str, Any],
    result: str,
    statuses: tuple[int, ...] = (0,),
    *,
    config: str | None = None,
) -> Command:
    file = f"configs/{config or name}.yaml"
    return Command(name=name, bundle=bundle, configs=(file,), options=options, result=result, statuses=statuses)


def _run(name: str, kind: str, commands: list[Command], **more: Any) -> Run:
    entries = {"facts": {}, "lists": {}, "cases": {}, "row": {}, **more}
    return Run(name=name, kind=kind, commands=tuple(commands), **{**entries, "needs": tuple(entries.get("needs", ()))})


def _minutes(run: Run, folds: Folds) -> float:
    return {
        "preparation": PREPARE_MINUTES,
        "pretraining": folds.pretraining.minutes if folds.pretraining else 0.0,
        "finetuning": folds.minutes,
        "inference": INFERENCE_MINUTES,
    }.get(run.kind, 1.0)


def _has_test(data: Path) -> bool:
    return bool(parse_data_list(data / "dataset.json").get("test"))


def _table() -> Mapping[str, Any]:
    from monai.bundle import ConfigParser

    return ConfigParser.load_config_file(str(TASKS))


def files_of(data: Path) -> dict[str, dict[str, int]]:
    """Return section to file to size in bytes, of the labelled and test scans of a data list."""
    content = parse_data_list(data / "dataset.json")
    found: dict[str, dict[str, int]] = {}
    for section in ("training", "validation", "test"):
        files = [file for case in content.get(section, []) for file in [*image_files(case), case.get("label")] if file]
        found[section] = {
            name: Path(file).stat().st_size for file, name in _short_names(files).items() if Path(file).is_file()
        }
    return found


def _short_names(files: Sequence[str]) -> dict[str, str]:
    """Return the end of each path that no other has, of two parts or more: it stays if the data are moved."""
    parts = {file: Path(file).parts for file in files}
    depth = 2
    while len({path[-depth:] for path in parts.values()}) < len(set(parts.values())):
        depth += 1
    return {file: "/".join(path[-depth:]) for file, path in parts.items()}


def _check_contents(contents: Mapping[str, Any], out: Path) -> None:
    """Refuse data other than those that an output folder was made with: its folds are of these cases."""
    path = out / CONTENTS
    if not path.is_file():
        return
    saved = read_json(path, CONTENTS_AGAIN)
    for task, sections in contents.items():
        for section, files in sections.items():
            found = first_difference(saved.get(task, sections).get(section, {}), files, resized="has another size")
            if found:
                raise InputError(
                    f"{out} was made with other data of {task}: {found[0]} {section} files differ; {found[1]}. Its "
                    "folds belong to the other data. Choose another output folder, or restore the data."
                )


def _digest(path: Path) -> str | None:
    """Return what distinguishes a file of weights; None for one that is not trained yet."""
    return file_hash(path)[:16] if path.is_absolute() else None


def _check_folder(out: Path, name: str) -> None:
    """Refuse an output folder of something else."""
    mark = out / MARK
    if mark.is_file():
        if (other := mark.read_text(encoding="utf-8").strip()) != name:
            raise InputError(f"{out} contains the cross-validation {other}, not {name}. Choose another output folder.")
        return
    found = sorted(out.iterdir()) if out.is_dir() else []
    foreign = [path for path in found if path.name[0] != "." and path.name != "task.yaml"]
    if foreign or (out / ".study").is_file():
        raise InputError(f"{out} contains files that no cross-validation made. Choose an empty or new output folder.")
