# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Say how a chain of doubled steps continues, from the scores so far: write a file with ``next`` and ``chosen``.

    python -m evidence.chain --out OUT --result FILE N

``next`` are the steps to run now, null at the end of the chain; ``chosen`` are the steps that are enough, null before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import write_text

from .results.convergence import read_chain
from .results.records import read_outline
from .score import score_ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow a chain from the command line."""
    parser = argparse.ArgumentParser(prog="python -m evidence.chain", description=__doc__.partition("\n")[0])
    parser.add_argument("n", type=int, help="number of labelled patients")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--result", type=Path, required=True, help="file to write")
    options = parser.parse_args(arguments)
    try:
        score_ended(options.out)
        chain = read_chain(options.out, read_outline(options.out), options.n)
    except InputError as error:
        parser.exit(1, f"Stopped: {error}\n")
    write_text(options.result, json.dumps({"next": chain.next, "chosen": chain.chosen}) + "\n")
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
