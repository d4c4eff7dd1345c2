# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Read a study file and check it before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from bundles.common.errors import InputError
from bundles.common.words import sentence

from .problems import arm_problems, comparison_problems, part_problems, search_problems
from .study import ENTRIES, Entries, Study

STUDIES = Path(__file__).parents[1] / "studies"
Built = TypeVar("Built", bound=Entries)


def read_study(name: str) -> Study:
    """Read a study file.

    Args:
        name: one of `studies/`, such as ``openkbp``, or the path of a YAML file.

    Raises:
        InputError: the file does not exist, is not YAML, or has wrong entries. Names the file, each wrong entry, its
            value and what is allowed.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in STUDIES.glob("*.yaml")))
        raise InputError(f"There is no study {name} ({path}). Pass {known}, or the path of a YAML file.")
    return check_study(read_entries(path, example="name: openkbp"), source=str(path))


def check_study(content: Mapping[str, Any], *, source: str) -> Study:
    """Build a study from the entries of a file.

    Args:
        content: the entries.
        source: path of the file.

    Raises:
        InputError: see `read_study`.
    """
    return build(Study, content, source, arm_problems, comparison_problems, search_problems, part_problems)


def read_entries(path: Path, *, example: str) -> Mapping[str, Any]:
    """Read the entries of a YAML file.

    Args:
        path: the file, which exists.
        example: an entry that it may have, for the message.

    Raises:
        InputError: it is not UTF-8, not YAML, or has no entries.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} must contain entries such as '{example}', not {content!r}.")
    return content


def build(
    model: type[Built], content: Mapping[str, Any], source: str, *checks: Callable[[Built], Iterable[str]]
) -> Built:
    """Build a model from the entries of a file.

    Args:
        model: the model, with the attribute ``source``.
        content: the entries.
        source: path of the file.
        checks: each gives the problems that entries have together.

    Raises:
        InputError: wrong entries, all of them; or the first problem.
    """
    try:
        built = model.model_validate(content).model_copy(update={"source": source})
    except ValidationError as error:
        raise InputError("\n".join(f"{source}: {_describe(each)}." for each in error.errors())) from None
    for problem in itertools.chain.from_iterable(check(built) for check in checks):
        raise InputError(f"{source}: {sentence(problem)}")
    return built


# Texts for errors of pydantic; the others read "Input should be ALLOWED".
ALLOWED = {
    **{"dict_type": ENTRIES, "model_type": ENTRIES, "list_type": "a list", "string_type": "text"},
    **{"too_short": "a list of at least one value", "bool_type": "true or false, without quotes"},
}


def _describe(error: Mapping[str, Any]) -> str:
    """Return an error of pydantic in words: the entry, its value and what is allowed."""
    location = [*error["loc"], *error.get("ctx", {}).get("below", ())]
    if location[-1] == "[key]":
        return f"{'.'.join(map(str, location[:-2]))} has the key {error['input']!r}: keys must be text"
    entry = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(".")
    if error["type"] == "missing":
        return f"{entry} is missing"
    if error["type"] == "entry":
        return f"{entry} {error['msg']}"
    allowed = ALLOWED.get(error["type"], error["msg"].removeprefix("Input should be "))
    return f"{entry} {error['input']!r} must be {allowed}"
