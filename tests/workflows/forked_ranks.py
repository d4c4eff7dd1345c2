# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The processes that ``torchrun`` would start, forked from one that has imported MONAI: a start takes a second.

With the variables that ``torchrun`` sets, and without ``torchrun``: tests of its signals and of its end use it.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..forked_python import ForkedPython


class ForkedRanks:
    """Running ranks of one run, with the part of `subprocess.Popen` that the tests use.

    Args:
        words: as of `ForkedPython`.
        processes: number of ranks.
        cwd: working folder.
        env: environment, whole, but for what tells the ranks apart.
    """

    def __init__(self, words: Sequence[object], *, processes: int, cwd: Path, env: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        self.ranks = [
            ForkedPython(
                words, cwd=cwd, env={**env, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True
            )
            for rank in range(processes)
        ]
        self.args = self.ranks[0].args

    def poll(self) -> int | None:
        """Return the exit status of the first rank that failed, else 0; None while all that ended did well."""
        ended = [rank.poll() for rank in self.ranks]
        failed = [status for status in ended if status]
        return failed[0] if failed else None if None in ended else 0

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of all; return what rank 0 has written to stdout, and what all have to stderr.

        Raises:
            subprocess.TimeoutExpired: one still runs after ``timeout`` seconds.
        """
        for rank in self.ranks:
            rank.wait(timeout)
        return self.ranks[0].output, "".join(rank.errors for rank in self.ranks)

    @property
    def returncode(self) -> int | None:
        """See `poll`."""
        return self.poll()

    def kill(self) -> None:
        """Kill all ranks and what they started."""
        for rank in self.ranks:
            if rank.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
