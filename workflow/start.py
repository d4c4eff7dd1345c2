# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Checks before a workflow starts: its engine, its output folder, and what jobs on other machines must see."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bundles.common.errors import InputError

PROFILES = Path(__file__).parent / "profiles"
LOCK = ".engine.lock"
# File systems of one machine. Any other may be shared: NFS, Lustre, GPFS, BeeGFS, CephFS, SMB, ...
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "squashfs", "apfs", "hfs"}


def read_profile(name: str) -> tuple[Path, dict[str, Any]]:
    """Return folder and content of a Snakemake profile.

    Args:
        name: one of `PROFILES`, or a folder with ``config.yaml``.

    Raises:
        InputError: it does not exist or is not YAML.
    """
    folder = PROFILES / name if (PROFILES / name).is_dir() else Path(name).expanduser().resolve()
    file = folder / "config.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.name for path in PROFILES.iterdir()))
        raise InputError(f"There is no profile {name} ({file}). Pass {known}, or a folder with config.yaml.")
    try:
        return folder, yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {error}") from None


def check_engine(profile: Mapping[str, Any], file: Path) -> str:
    """Return the executor of a profile, once it is known that it is installed.

    Args:
        profile: its content.
        file: its file, for the message.

    Raises:
        InputError: Snakemake, the executor's plugin or its commands are missing.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise InputError("Snakemake is not installed. Install it: make install EXTRAS=workflow.")
    executor = str(profile.get("executor", "local"))
    plugin = f"snakemake_executor_plugin_{executor.replace('-', '_')}"
    if executor != "local" and importlib.util.find_spec(plugin) is None:
        raise InputError(
            f"{file} asks for the executor {executor}, but its plugin is not installed. Install it: "
            f"pip install {plugin.replace('_', '-')}."
        )
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise InputError(
            f"{file} asks for the executor slurm, but this machine has no sbatch. Start on a login node of the cluster."
        )
    return executor


def check_shared(paths: Mapping[str, Path | None], mounts: str = "/proc/mounts") -> None:
    """Refuse paths on a disk of this machine, which jobs on other machines do not see.

    Args:
        paths: what it is to path; None is left out.
        mounts: table of mounted file systems; where there is none, nothing is checked.

    Raises:
        InputError: names all such paths, their file systems and what to do.
    """
    if not os.path.exists(mounts):
        return
    table = [line.split()[:3] for line in Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()]
    points = [(Path(point.replace("\\040", " ")), kind) for _, point, kind in table]
    local = []
    for what, path in paths.items():
        if path is None:
            continue
        path = path.resolve()
        above = [
            (point, kind) for point, kind in points if path == point or point in path.parents or point == Path("/")
        ]
        point, kind = max(above, key=lambda each: len(each[0].parts), default=(None, ""))
        if kind in LOCAL:
            local.append(f"{what} {path} is on {point}, a disk of this machine ({kind})")
    if local:
        raise InputError(
            f"{'; '.join(local)}. Jobs on other machines would not see that. Use a disk that all machines share. If they "
            "do share it, or all jobs run on this machine, add SHARED_DISK=1 (--shared_disk)."
        )


def claim_folder(out: Path) -> None:
    """Claim an output folder for this process, and for the engine that it becomes, until it ends.

    Remove what an engine that was killed left locked.

    Args:
        out: the folder; made if it does not exist.

    Raises:
        InputError: another workflow runs in it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"Cannot write into {out}: {error.strerror}. Choose another output folder.") from None
    try:
        # A lock of the process: unlike one of the open file, the jobs that the engine starts do not keep it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(lock, 200).decode(errors="replace").strip() or "unknown"
        raise InputError(
            f"Another workflow runs in {out} ({owner}). Wait for it, stop it, or choose another output folder."
        ) from None
    except OSError as error:  # some network disks have no locks
        print(f"{out} cannot be locked ({error.strerror}): start no other workflow into it.", file=sys.stderr)
    os.ftruncate(lock, 0)
    os.write(
        lock, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
    )
    os.set_inheritable(lock, True)  # kept when this process becomes the engine
    shutil.rmtree(out / ".snakemake" / "locks", ignore_errors=True)


def engine_words(
    target: str,
    *,
    out: Path,
    profile: Path,
    config: Mapping[str, Any],
    resources: Mapping[str, int],
    more: Sequence[str],
) -> list[str]:
    """Return the command line of Snakemake after ``python``.

    Args:
        target: what to make.
        out: output folder.
        profile: folder of the profile.
        config: entries of ``--config``.
        resources: limits of this machine, such as the number of its GPUs.
        more: further options of Snakemake.
    """
    words = ["-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile")), "--directory", str(out)]
    words += ["--workflow-profile", str(profile), "--config", *(f"{key}={value}" for key, value in config.items())]
    if resources:
        words += ["--resources", *(f"{key}={value}" for key, value in resources.items())]
    return [*words, *more, "--", target]
