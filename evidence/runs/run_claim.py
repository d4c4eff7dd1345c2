# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""A run is one process's at a time: processes on any number of machines that see one folder agree on it by files alone.

The claims on a run are files ``.claim.1``, ``.claim.2``, ... in its folder; the highest number is the holder's. A number
is taken by creating its file exclusively, which one process alone can do; none is ever removed, so none is taken twice.
The holder touches its file while it works, and marks it when it ends. A claim that is marked, whose process is known to be gone (same machine), or that was not touched for `STALE`
seconds by the clock of the file system, is dead: the next number may be taken.
"""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from contextlib import suppress
from pathlib import Path

from bundles.common.files import write_text

STALE = 180.0
NAME = ".claim.{}"


class ClaimLost(Exception):
    """Another process took this run over, since it had not heard from this one for long."""


class Claim:
    """A held claim; see `take`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def beat(self) -> None:
        """Say that the holder lives.

        Raises:
            ClaimLost: if it is no longer the holder.
        """
        if _newest(self.path.parent) != _number(self.path):
            raise ClaimLost(f"{self.path} was taken over")
        with suppress(FileNotFoundError):
            os.utime(self.path)

    def release(self) -> None:
        """Let others take the run. The file stays, lest a slow process that judged it take a number twice."""
        write_text(self.path, json.dumps({"released": True}))


def take(folder: Path, *, stale: float = STALE) -> Claim | None:
    """Claim the run of a folder, or return None where a living process holds it.

    Args:
        folder: of the run; made if absent.
        stale: seconds without a sign after which a holder counts as dead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest = _newest(folder)
    if newest and is_alive(folder / NAME.format(newest), stale=stale):
        return None
    path = folder / NAME.format(newest + 1)
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    with open(file, "w", encoding="utf-8") as opened:
        json.dump({"machine": _machine(), "pid": os.getpid()}, opened)
    return Claim(path)


def is_held(folder: Path, *, stale: float = STALE) -> bool:
    """Whether a living process works on the run of a folder."""
    newest = _newest(folder)
    return bool(newest) and is_alive(folder / NAME.format(newest), stale=stale)


def is_alive(path: Path, *, stale: float = STALE) -> bool:
    """Whether the process that made a claim still works, as far as can be told from here."""
    try:
        age = _now(path.parent) - path.stat().st_mtime
        holder = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:  # created, and not yet written
        return age < stale
    if holder.get("released"):
        return False
    if holder.get("machine") == _machine():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return age < stale


def _now(folder: Path) -> float:
    """The clock that the file system stamps files with: that of a server may differ from ours."""
    probe = folder / f".now.{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """Host and, where there is one, name space of process numbers: two containers may share a host's name."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}/{space}"


def _number(path: Path) -> int:
    found = re.fullmatch(r"\.claim\.(\d+)", path.name)
    return int(found[1]) if found else 0


def _newest(folder: Path) -> int:
    return max((_number(path) for path in folder.glob(NAME.format("*"))), default=0)
