# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Train a position network first, where none is given: a run of swin_unetr_pretrain in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ....common.errors import InputError
from ....common.files import write_text
from ....common.run.clean_stop import stops_cleanly
from ....common.run.known_lines import without_config_note
from ..itk_images import simple_itk

logger = logging.getLogger(__name__)

FOLDER = "position_network"  # in the output of the run
MADE_WITH = "made_with.json"  # scans and options of the training
PATIENCE = 60.0  # seconds that a stopped training may take to save its state


def position_network_file(
    *,
    position_network: str | None,
    pretrain_scans: str | Sequence[str] | None,
    pretrain_bundle: str,
    pretrain_options: Sequence[str],
    output_dir: str,
    device: str,
) -> str:
    """Return the file of the position network; train it first if only scans are given.

    A training that was stopped is continued, and one that was finished is used as it is.

    Args:
        position_network: ``network.pt`` of a pre-training with the task position, or None.
        pretrain_scans: folders or data lists of scans without labels, for the training.
        pretrain_bundle: folder of the bundle swin_unetr_pretrain.
        pretrain_options: further options of its train.yaml, as on the command line.
        output_dir: the training writes to its subfolder `FOLDER`.
        device: the training's device.

    Raises:
        InputError: neither or both are given, the file or the bundle does not exist, or the training fails.
    """
    check_position_network(position_network, pretrain_scans, pretrain_bundle, pretrain_options)
    if position_network is not None:
        return position_network
    folder = Path(output_dir) / FOLDER
    result = folder / "models" / "network.pt"
    made_with = json.dumps({"pretrain_scans": _text(pretrain_scans), "pretrain_options": [*map(str, pretrain_options)]})
    note = folder / MADE_WITH
    begun = result.is_file() or (folder / "models" / "last.pt").is_file()
    if begun and note.is_file() and (before := note.read_text(encoding="utf-8").strip()) != made_with:
        raise InputError(
            f"{folder} was made with {before}, and this run has {made_with}. Undo the change, remove the folder to train "
            "anew, or choose another --output_dir."
        )
    if result.is_file():
        logger.info("the position network of an earlier run is used: %s", result)
        return str(result)
    config = _config(pretrain_bundle)
    command = [
        *(sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), "--bundle_root", pretrain_bundle),
        *("--dataset_dir", _text(pretrain_scans), "--tasks", "['position']", "--reconstruction_head", "unet"),
        *("--output_dir", str(folder), "--device", str(device)),
        *("--resume", str((folder / "models" / "last.pt").is_file())),
        *map(str, pretrain_options),
    ]
    logger.info("training the position network: %s", " ".join(command))
    write_text(note, made_with + "\n")
    status = _run(command)
    if status or not result.is_file():
        raise InputError(
            f"The training of the position network ended with status {status}; its messages are above. The same command "
            "continues it."
        )
    return str(result)


def check_position_network(
    position_network: str | None,
    pretrain_scans: str | Sequence[str] | None,
    pretrain_bundle: str,
    pretrain_options: Sequence[str],
) -> None:
    """Check what `position_network_file` needs, before scans are read. Use it as an entry of the config's `run`.

    Raises:
        InputError: see `position_network_file`; or SimpleITK is not installed.
    """
    simple_itk()
    if (position_network is None) == (pretrain_scans is None):
        raise InputError(
            "Give either --position_network (network.pt of a pre-training of swin_unetr_pretrain with "
            "--tasks \"['position']\") or --pretrain_scans (a folder of scans without labels, from which it is trained first)."
        )
    if position_network is not None:
        if Path(position_network).is_dir():
            raise InputError(
                f"--position_network {position_network} is a folder: name a file, such as "
                f"{Path(position_network) / 'models' / 'network.pt'}, which a pre-training writes to its output."
            )
        if not Path(position_network).is_file():
            raise InputError(f"--position_network {position_network} does not exist.")
        return
    if not isinstance(pretrain_options, (list, tuple)):
        raise InputError(
            f"--pretrain_options {pretrain_options!r} must be a list, such as \"['--preset','cpu','--max_steps','1000']\"."
        )
    config = _config(pretrain_bundle)
    if not config.is_file():
        raise InputError(
            f"--pretrain_scans needs the bundle swin_unetr_pretrain, and {config} does not exist. Set --pretrain_bundle to "
            "its folder, or train the network there and pass it as --position_network."
        )


def _config(pretrain_bundle: str) -> Path:
    return Path(pretrain_bundle) / "configs" / "train.yaml"


def _run(command: Sequence[str]) -> int:
    """Run a training, whose log goes to this terminal; stop it in order when this process is stopped."""
    # Safe path: only the code of that bundle, not of this folder.
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": without_config_note()},
        start_new_session=True,
    )
    try:
        with stops_cleanly():
            return process.wait()
    except BaseException:
        process.terminate()  # it writes last.pt first
        try:
            process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def _text(sources: str | Sequence[str]) -> str:
    """Return one path, or several as a list, as on the command line."""
    return str(sources) if isinstance(sources, (str, os.PathLike)) else str([str(source) for source in sources])
