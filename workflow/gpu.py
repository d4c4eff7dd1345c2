# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Give each job on one machine a GPU of its own. A cluster does this itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bundles.common.errors import InputError
from bundles.common.files import folder_lock

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
    if VISIBLE in os.environ:
        names = [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else names  # CUDA ignores what follows -1
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def one_gpu(gpus: list[str] | None = None, locks: Path | None = None) -> Iterator[str]:
    """Take a GPU that no other job on this machine has, and show only it to what is started meanwhile.

    Args:
        gpus: names of the GPUs to choose from; None: `visible_gpus`.
        locks: folder of the lock files; None: one of this user below the folder for temporary files.

    Raises:
        InputError: all are taken.
    """
    gpus = visible_gpus() if gpus is None else gpus
    locks = locks or Path(tempfile.gettempdir(), f"swin_unetr_gpus_{os.getuid()}")
    with ExitStack() as held:
        for gpu in gpus:
            try:
                held.enter_context(folder_lock(locks / f"{gpu}.lock", wait=False))
            except BlockingIOError:
                continue
            break
        else:
            raise InputError(
                f"All {len(gpus)} GPUs of this machine are taken by other jobs. Start the workflow with fewer GPUs: "
                "GPUS=1 of make, or --resources gpu=1 of snakemake."
            )
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = gpu
        try:
            yield gpu
        finally:
            os.environ.pop(VISIBLE)
            if before is not None:
                os.environ[VISIBLE] = before
