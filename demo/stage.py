# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""One stage of the demo: a command and its outputs. It runs once, and again only if something it depends on changed.

``.stages/NAME.json`` is written when the command has succeeded. A stage counts as finished as long as this record has
the same command, the same code and the same input files from earlier stages, and its outputs are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bundles.common.errors import InputError
from bundles.common.files import file_stamp, write_text

RECORDS = ".stages"
CODE_SUFFIXES = {".py", ".yaml", ".json", ".conf", ".jinja"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What to run, and which files it writes.

    Args:
        name: short name, used for the record and the log.
        title: name on the screen and in the report.
        command: the words after ``python``.
        outputs: glob patterns of the output files, relative to the demo's folder; each must match a file.
        needs: names of the stages whose outputs it reads.
        code: files and folders whose contents determine what the command does.
        folder: emptied before a new start, relative to the demo's folder; None: nothing is removed.
        resume: words to append when the same command was interrupted; None: start again from the beginning.
        seconds: rough duration, which sets the stage's share of the progress bar.
    """

    name: str
    title: str
    command: Sequence[str]
    outputs: Sequence[str]
    needs: Sequence[str] = ()
    code: Sequence[Path] = ()
    folder: str | None = None
    resume: Sequence[str] | None = None
    seconds: float = 10.0


class Attempt(NamedTuple):
    """A stage that has begun.

    Attributes:
        stage: the stage.
        words: the words after ``python``.
        key: what the stage depended on when it began: a change while it runs makes its result stale.
        spent: seconds of earlier, interrupted attempts.
        resumed: whether it continues an interrupted attempt.
    """

    stage: Stage
    words: list[str]
    key: dict[str, Any]
    spent: float
    resumed: bool


class Records:
    """The records of all stages under one folder.

    Args:
        out: the demo's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / RECORDS

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the record of a finished stage, or None."""
        return _read(self.folder / f"{name}.json")

    def is_done(self, stage: Stage) -> bool:
        """Return whether the stage is finished and up to date."""
        record = self.read(stage.name)
        return (
            record is not None and record.get("key") == self.key(stage) and record.get("outputs") == self.outputs(stage)
        )

    def key(self, stage: Stage) -> dict[str, Any]:
        """Return everything that determines the stage's result: command, code, and files of the stages it needs."""
        inputs = {name: (self.read(name) or {}).get("outputs") for name in stage.needs}
        return {"command": list(stage.command), "code": code_hash(stage.code), "inputs": _digest(inputs)}

    def outputs(self, stage: Stage) -> dict[str, list[int]] | None:
        """Return size in bytes and modification time in ns of each output file, or None if one is missing."""
        found: dict[str, list[int]] = {}
        for pattern in stage.outputs:
            files = [path for path in sorted(self.out.glob(pattern)) if path.is_file() and path.name[0] != "."]
            if not files:
                return None
            for path in files:
                found[path.relative_to(self.out).as_posix()] = file_stamp(path)
        return found

    def begin(self, stage: Stage) -> Attempt:
        """Prepare to run a stage, and record that it has begun."""
        key, noted = self.key(stage), _read(self.folder / f"{stage.name}.begun.json")
        resumed = stage.resume is not None and noted is not None and noted.get("key") == key
        spent = float(noted.get("seconds", 0)) if resumed else 0.0
        (self.folder / f"{stage.name}.json").unlink(missing_ok=True)
        if not resumed and stage.folder:
            shutil.rmtree(self.out / stage.folder, ignore_errors=True)
        attempt = Attempt(stage, [*stage.command, *(stage.resume if resumed else ())], key, spent, resumed)
        self.note(attempt, 0)
        return attempt

    def note(self, attempt: Attempt, seconds: float) -> None:
        """Record how many seconds the running attempt has taken so far."""
        noted = {"key": attempt.key, "seconds": round(attempt.spent + seconds, 1)}
        _write(self.folder / f"{attempt.stage.name}.begun.json", noted)

    def finish(self, attempt: Attempt, seconds: float) -> None:
        """Record that an attempt has succeeded.

        Args:
            attempt: what `begin` returned.
            seconds: duration of only this attempt.

        Raises:
            InputError: if an output is missing.
        """
        stage = attempt.stage
        outputs = self.outputs(stage)
        if outputs is None:
            missing = [pattern for pattern in stage.outputs if not any(self.out.glob(pattern))]
            raise InputError(f"Stage {stage.name} ended without an error but did not write {', '.join(missing)}.")
        finished = time.strftime("%Y-%m-%d %H:%M:%S")
        seconds = round(attempt.spent + seconds, 1)
        about = {"title": stage.title, "seconds": seconds, "finished": finished}
        _write(self.folder / f"{stage.name}.json", {**about, "key": attempt.key, "outputs": outputs})
        (self.folder / f"{stage.name}.begun.json").unlink(missing_ok=True)


def code_hash(paths: Sequence[Path]) -> str:
    """Return a hash of the code and configs in files and folders. Links to folders are not followed."""
    files = {Path(path): Path(path).name for path in paths if Path(path).is_file()}
    for root in (Path(path) for path in paths if Path(path).is_dir()):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - {"__pycache__"})
            for name in sorted(names):
                if Path(name).suffix in CODE_SUFFIXES:
                    files[Path(folder, name)] = f"{root.name}/{Path(folder, name).relative_to(root).as_posix()}"
    total = hashlib.sha256()
    for path, name in files.items():
        total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
