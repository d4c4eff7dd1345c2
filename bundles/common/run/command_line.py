# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""What ``python -m monai.bundle run`` would take without a word: a misspelt ``--option``, and the words that YAML has for yes, no and nothing.

MONAI adds an unknown top-level key to the config and runs on, so ``--max_step 10`` would train for all the default steps. python-fire reads ``True``
and ``False``, but takes ``true`` and ``false`` for texts, which both count as yes. MONAI drops an option whose value is None.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from ..errors import InputError

# As they stand in YAML, and None as Python writes null: fire and MONAI lose them.
WORDS = {"true": True, "false": False, "null": None, "None": None, None: None}


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


def check_command_line(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check every ``--option`` of a ``monai.bundle run`` command line against the ids of its config files.

    Nested ids (``--train#trainer#amp``) are checked by their top-level part; MONAI itself refuses a nested id whose parent is absent.
    A process that is not ``monai.bundle run`` (MONAI Label, a Python call) is left alone.

    Args:
        argv: the words of the command line, ``sys.argv`` by default.

    Returns:
        What is meant by ``true``, ``false``, ``null`` and ``None`` as the value of a top-level entry, by its name.

    Raises:
        InputError: names the option, the nearest known ones and the config files looked in; or how to write such a word for a nested entry.
    """
    argv = sys.argv if argv is None else argv
    if len(argv) < 2 or not argv[0].replace("\\", "/").endswith("monai/bundle/__main__.py") or argv[1] != "run":
        return {}
    options = _command_line_options(argv[2:])
    arguments: dict[str, object] = {}
    if "args_file" in options:
        arguments.update(ConfigParser.load_config_file(options["args_file"]))
    arguments.update(options)
    if "config_file" not in arguments:
        return {}  # given by position: nothing to compare with, MONAI reports what is missing
    files = _config_files(arguments["config_file"])
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
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join('--' + name for name in near)}?" if near else ""
            raise InputError(
                f"--{option} is not an option of {', '.join(files)}.{hint} "
                "The options are the top-level entries of the config file, each with a comment."
            )
        if isinstance(value, (str, type(None))) and value in WORDS and option not in inspect.signature(run).parameters:
            if option not in config:
                word = "'$None'" if WORDS[value] is None else WORDS[value]
                raise InputError(
                    f"--{option} {value} would not reach the run as {WORDS[value]}. Write --{option} {word}."
                )
            words[option] = WORDS[value]
    return words
