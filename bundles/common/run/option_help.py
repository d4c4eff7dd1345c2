# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Describe the options of a config from the config itself: names, defaults, comments, in its groups (``--help``)."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from ..errors import InputError
from .options import END
from .presets import choose, preset_names

GROUP = re.compile(r"# -{5,} (.+)")  # a heading among the options
ENTRY = re.compile(r"""(\w+):\s*((?:'[^']*'|"[^"]*"|[^'"#]|(?<=\S)#)*?)(?:\s+# (.*))?""")  # name, value, comment
NOT_OPTIONS = {"imports", "bundle_root"}
WIDTH = 100  # columns, if the terminal is wider or none


@dataclass(frozen=True)
class Option:
    """An option as its config writes it.

    Attributes:
        group: heading above it, "" above the first one.
        name: the option's name, without ``--``.
        default: what is written after the colon: a value, a reference or an expression.
        comment: what the config says about it.
    """

    group: str
    name: str
    default: str
    comment: str


def options_of(file: str | Path) -> list[Option]:
    """Read the options of a config, in its order. For a JSON file, which has no comments, the YAML next to it is read.

    Raises:
        InputError: the file does not exist.
    """
    path = Path(file)
    if path.suffix == ".json" and path.with_suffix(".yaml").exists():
        path = path.with_suffix(".yaml")
    if not path.is_file():
        raise InputError(f"{path} not found. Run inside the bundle's folder, or pass the path of the config.")
    if path.suffix == ".json":
        names = list(ConfigParser.load_config_file(str(path)).items())
        end = next((number for number, (name, _) in enumerate(names) if name == END), len(names))
        return [Option("", name, str(value), "") for name, value in names[:end] if name not in NOT_OPTIONS]
    found: list[Option] = []
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{END}:"):
            break
        if heading := GROUP.fullmatch(line):
            group = heading[1][0].upper() + heading[1][1:]
        elif (entry := ENTRY.fullmatch(line.rstrip())) and entry[1] not in NOT_OPTIONS:
            found.append(Option(group, entry[1], entry[2] or "", entry[3] or ""))
    return found


def default_of(option: Option, values: Mapping[str, Any] | None) -> str:
    """Return the default of an option as a reader understands it.

    Args:
        option: the option.
        values: values of the preset; None: not known before a model is read.
    """
    text = option.default
    if re.fullmatch(r"'[^']*'|\"[^\"]*\"", text):
        text = text[1:-1]
    if of_preset := re.fullmatch(r"\$@values\['(\w+)'\]", text):
        return "from the preset" if values is None else _written(values[of_preset[1]])
    if "@row[" in text:
        return "from the task"
    if folder := re.fullmatch(r"\$@bundle_root \+ '(.+)'", text):
        return f"BUNDLE{folder[1]}"
    if text.startswith("{_target_:"):
        return "automatic"
    return "null" if text.startswith("%") or not text else text


def values_of(file: str | Path, preset: str | None = None) -> tuple[str | None, dict[str, Any] | None]:
    """Return the preset whose values are the defaults of a config, and these values; None if the config names none.

    Args:
        file: the config; ``presets.yaml`` is next to it.
        preset: name of the preset; None: the config's own.

    Raises:
        InputError: there is no such preset.
    """
    presets = Path(file).with_name("presets.yaml")
    own = next((option.default for option in options_of(file) if option.name == "preset"), None)
    name = preset or (None if own in (None, "null") else own)
    return (name, choose(preset=name, file=str(presets))) if name and presets.exists() else (None, None)


def help_text(files: Sequence[str], *, preset: str | None = None) -> str:
    """Return a page about the options of the config files of a run.

    Args:
        files: config files.
        preset: preset of the command line, or None.

    Raises:
        InputError: a file or the preset does not exist.
    """
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    lines = []
    for file in files:
        name, values = values_of(file, preset)
        under = f" Defaults are those of --preset {name}." if name else ""
        lines += ["", *textwrap.wrap(f"Options of {file}, each as --name value.{under}", width)]
        for group, options in groupby(options_of(file), key=lambda option: option.group):
            lines += ["", group] if group else [""]
            for option in options:
                lines.append(f"  --{option.name} {default_of(option, values)}")
                lines += textwrap.wrap(
                    option.comment, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
                )
        presets = Path(file).with_name("presets.yaml")
        if name:
            lines += ["", *textwrap.wrap(f"Presets: {', '.join(preset_names(str(presets)))} ({presets})", width)]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
