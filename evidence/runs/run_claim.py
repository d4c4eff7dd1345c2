# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Claim a run for one process at a time, among processes on any number of machines that share a folder.

The claims on a run are files ``.claim.1``, ``.claim.2``, ... in its folder; the highest number belongs to the holder. A
process takes a number by creating its file exclusively, which only one process can do. Files are never removed, so no
number is taken twice. The holder touches its file while it works, and marks it as released at the end. A claim is dead
if it is released, if its process has ended (on the same machine), or if it was not touched for `STALE` seconds by the
clock of the file system. Then the next number may be taken.
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
    """Another process took over this run, because this one had not touched its claim for too long."""


class Claim:
    """A claim that this process holds, see `take`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def beat(self) -> None:
        """Touch the claim to show that the holder is alive.

        Raises:
            ClaimLost: if another process has taken over the run.
        """
        if _newest(self.path.parent) != _number(self.path):
            raise ClaimLost(f"{self.path} was taken over")
        with suppress(FileNotFoundError):
            os.utime(self.path)

    def release(self) -> None:
        """Let others take the run. The file stays: a slow process may still try to take the next number after it."""
        write_text(self.path, json.dumps({"released": True}))


def take(folder: Path, *, stale: float = STALE) -> Claim | None:
    """Claim the run of a folder.

    Args:
        folder: folder of the run; made if it does not exist.
        stale: seconds without a touch after which a holder counts as dead.

    Returns:
        The claim, or None if a living process holds the run.
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
    """Return whether a living process holds the run of a folder."""
    newest = _newest(folder)
    return bool(newest) and is_alive(folder / NAME.format(newest), stale=stale)


def is_alive(path: Path, *, stale: float = STALE) -> bool:
    """Return whether the process that made a claim is alive, as far as this machine can tell."""
    try:
        age = _now(path.parent) - path.stat().st_mtime
        holder = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:  # created but not yet written
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
    """Time by the clock of the file system, which may differ from this machine's."""
    probe = folder / f".now.{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """Host name and, on Linux, the PID namespace: two containers may have the same host name."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}/{namespace}"


def _number(path: Path) -> int:
    found = re.fullmatch(r"\.claim\.(\d+)", path.name)
    return int(found[1]) if found else 0


def _newest(folder: Path) -> int:
    return max((_number(path) for path in folder.glob(NAME.format("*"))), default=0)
