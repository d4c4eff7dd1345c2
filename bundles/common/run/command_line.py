# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Catch what ``python -m monai.bundle run`` silently accepts: misspelt options and YAML-style true/false/null.

MONAI adds an unknown top-level key to the config and continues: ``--max_step 10`` would train for the default number of
steps. python-fire reads ``True`` and ``False`` as booleans, but ``true`` and ``false`` as strings, which both count as
true. MONAI drops an option whose value is None. And it lets a nested entry be set in addition to the option that
governs it: ``--train#dataloader#batch_size 1`` would leave ``batch_size`` as recorded and compared on resume.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from ..errors import InputError
from ..words import did_you_mean
from .option_help import help_text
from .options import END, option_names

# YAML's spellings, and Python's None: python-fire and MONAI lose them.
WORDS = {"true": True, "false": False, "null": None, "None": None, None: None}


def _command_line_options(argv: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line as python-fire reads them: ``--a-b x`` and ``--a_b=x`` are both ``a_b``."""
    options: dict[str, str] = {}
    for position, word in enumerate(argv):
        if not word.startswith("--") or len(word) == 2:
            continue
        name, has_value, value = word[2:].partition("=")
        if not has_value and position + 1 < len(argv):
            value = argv[position + 1]
        options[name.replace("-", "_")] = value
    return options


def _config_files(value: object) -> list[str]:
    if isinstance(value, str) and value.startswith("["):
        value = ast.literal_eval(value)
    return [str(name) for name in value] if isinstance(value, (list, tuple)) else [str(value)]


def _is_bundle_run(argv: Sequence[str]) -> bool:
    return len(argv) > 1 and argv[0].replace("\\", "/").endswith("monai/bundle/__main__.py") and argv[1] == "run"


def _arguments(argv: Sequence[str]) -> dict[str, object]:
    """Return the options of a command line, with those of its ``--args_file``."""
    options = _command_line_options(argv[2:])
    arguments: dict[str, object] = {}
    if "args_file" in options:
        arguments.update(ConfigParser.load_config_file(options["args_file"]))
    return arguments | options


def typed_command(argv: Sequence[str] | None = None) -> str | None:
    """Return the ``python -m monai.bundle run`` command of this process, to copy; None if it is something else."""
    argv = sys.argv if argv is None else argv
    return shlex.join(["python", "-m", "monai.bundle", *argv[1:]]) if _is_bundle_run(argv) else None


def typed_option(name: str, argv: Sequence[str] | None = None) -> object | None:
    """Return an option as this process' ``monai.bundle run`` command has it; None if it has none."""
    argv = sys.argv if argv is None else argv
    return _arguments(argv).get(name) if _is_bundle_run(argv) else None


def next_command(
    config: str, options: Mapping[str, object], *, bundle: str | None = None, argv: Sequence[str] | None = None
) -> str | None:
    """Return a command for another workflow, to copy into the shell that this one was typed in.

    Args:
        config: its file in ``configs/``.
        options: name to value; None is left out. A list is written as python-fire reads it.
        bundle: folder name of the bundle next to this one; None: this bundle.
        argv: the words of the command line, ``sys.argv`` by default.

    Returns:
        The command; None if this process is not a ``monai.bundle run``, or has no such bundle next to it.
    """
    files = typed_option("config_file", argv)
    if files is None:
        return None
    folder = Path(_config_files(files)[0]).parent
    root = typed_option("bundle_root", argv)
    if bundle is not None:
        folder = Path(os.path.normpath(folder / ".." / ".." / bundle / "configs"))
        root = folder.parent
        if not (folder / config).is_file():
            return None
    words = ["python", "-m", "monai.bundle", "run", "--config_file", str(folder / config)]
    for name, value in ({"bundle_root": root} | dict(options)).items():
        if value is not None:
            words += [f"--{name}", str(list(value) if isinstance(value, tuple) else value)]
    return shlex.join(words)


def check_command_line(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check every ``--option`` of a ``monai.bundle run`` command line against the ids of its config files.

    Nested ids (``--optimizer#fused``) are checked by their top-level part. MONAI itself refuses a nested id whose
    parent does not exist. One whose value comes from an option, or that has the name of an option, is refused. Nothing
    is checked in a process that is not ``monai.bundle run`` (MONAI Label, a Python call).

    ``--help`` prints the options and ends the run.

    Args:
        argv: the words of the command line, ``sys.argv`` by default.

    Returns:
        The intended value of each top-level entry that was passed as ``true``, ``false``, ``null`` or ``None``, by its
        name.

    Raises:
        InputError: an option is unknown (names the nearest known ones and the config files), a nested entry is set that
            an option governs (names the option), or one was passed as one of these words (states how to write it).
    """
    argv = sys.argv if argv is None else argv
    if not _is_bundle_run(argv):
        return {}
    arguments = _arguments(argv)
    if "config_file" not in arguments:
        return {}  # passed by position: nothing to compare with, and MONAI reports what is missing
    files = _config_files(arguments["config_file"])
    if "help" in arguments or "-h" in argv:
        preset = arguments.get("preset")
        print(help_text(files, preset=None if preset is None else str(preset)))
        raise SystemExit(0)
    config = ConfigParser.load_config_files(files)
    known = {str(key).replace("#", "::").split("::")[0].lstrip("+") for key in config}
    known |= set(inspect.signature(run).parameters) - {"override"}
    tracking = str(arguments.get("tracking"))
    if tracking in DEFAULT_EXP_MGMT_SETTINGS:
        known |= set(DEFAULT_EXP_MGMT_SETTINGS[tracking]["configs"])

    words: dict[str, Any] = {}
    for option, value in arguments.items():
        key = option.replace("#", "::").split("::")[0].lstrip("+")
        if key not in known and not key.startswith("_"):
            hint = did_you_mean(key, known, most=3, before="--")
            raise InputError(
                f"--{option} is not an option of {', '.join(files)}. {hint}"
                "The options are the top-level entries of the config file, each with a comment."
            )
        if option.replace("#", "::") != key and (governing := _governing(config, option)):
            raise InputError(
                f"--{option} would replace what --{governing} sets, and the run would record the value of --{governing}: "
                f"pass --{governing} instead."
            )
        if isinstance(value, (str, type(None))) and value in WORDS and option not in inspect.signature(run).parameters:
            if option not in config:
                word = "'$None'" if WORDS[value] is None else WORDS[value]
                raise InputError(
                    f"--{option} {value} would not reach the run as {WORDS[value]}. Write --{option} {word}."
                )
            words[option] = WORDS[value]
    return words


def _governing(config: Mapping[str, Any], option: str) -> str | None:
    """Return the option that a nested entry refers to, or whose name it has, and that decides its value; or None."""
    options = option_names(config) if END in config else []
    path = option.replace("#", "::").lstrip("+").split("::")
    content: Any = config
    for part in path:
        if isinstance(content, Mapping):
            content = content.get(part)
        elif isinstance(content, list) and part.isdigit() and int(part) < len(content):
            content = content[int(part)]
        else:
            content = None
    named = re.findall(r"@(\w+)", content) if isinstance(content, str) else []
    return next((name for name in (*named, path[-1]) if name in options), None)
