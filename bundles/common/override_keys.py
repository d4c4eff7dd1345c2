# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse what ``python -m monai.bundle run`` would take without a word: a misspelt ``--option``, and ``--option None``.

MONAI adds an unknown top-level key to the config and runs on, so ``--max_step 10`` would train for all the default steps. And it drops an
option whose value is None, so ``--early_stopping None`` would leave what the preset says. An expression works: ``--early_stopping '$None'``.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from collections.abc import Sequence

from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from .input_error import InputError


def _command_line_options(argv: Sequence[str]) -> dict[str, str]:
    """Options of a command line as python-fire reads them: ``--a-b x`` and ``--a_b=x`` are both ``a_b``."""
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


def refuse_unknown_options(argv: Sequence[str] | None = None) -> None:
    """Check every ``--option`` of a ``monai.bundle run`` command line against the ids of its config files.

    Nested ids (``--train#trainer#amp``) are checked by their top-level part; MONAI itself refuses a nested id whose parent is absent.
    A process that is not ``monai.bundle run`` (MONAI Label, a Python call) is left alone.

    Args:
        argv: the words of the command line, ``sys.argv`` by default.

    Raises:
        InputError: names the option, the nearest known ones and the config files looked in; or the way to write null.
    """
    argv = sys.argv if argv is None else argv
    if len(argv) < 2 or not argv[0].replace("\\", "/").endswith("monai/bundle/__main__.py") or argv[1] != "run":
        return
    options = _command_line_options(argv[2:])
    arguments: dict[str, object] = {}
    if "args_file" in options:
        arguments.update(ConfigParser.load_config_file(options["args_file"]))
    arguments.update(options)
    if "config_file" not in arguments:
        return  # given by position: nothing to compare with, MONAI reports what is missing
    files = _config_files(arguments["config_file"])
    config = ConfigParser.load_config_files(files)
    known = {str(key).replace("#", "::").split("::")[0].lstrip("+") for key in config}
    known |= set(inspect.signature(run).parameters) - {"override"}
    tracking = str(arguments.get("tracking"))
    if tracking in DEFAULT_EXP_MGMT_SETTINGS:
        known |= set(DEFAULT_EXP_MGMT_SETTINGS[tracking]["configs"])

    for option, value in arguments.items():
        if (value is None or value in ("None", "null")) and option not in inspect.signature(run).parameters:
            raise InputError(
                f"--{option} {value} would be dropped by MONAI. Write --{option} '$None', in single quotes."
            )
        key = option.replace("#", "::").split("::")[0].lstrip("+")
        if key not in known and not key.startswith("_"):
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join('--' + name for name in near)}?" if near else ""
            raise InputError(
                f"--{option} is not an option of {', '.join(files)}.{hint} "
                "The options are the top-level entries of the config file, each with a comment."
            )
