# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Bring MLflow up to date with the folder of a study: finished runs with parameters, scores and curves, and the report.

python -m evidence.track --out OUT [--tracking_uri URI]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bundles.common.errors import InputError, report_input_errors

from .results.mlflow_store import log_missing, log_report, open_store, tracking_store
from .results.records import read_outline


def main(arguments: Sequence[str] | None = None) -> int:
    """Log a study from the command line."""
    parser = argparse.ArgumentParser(prog="python -m evidence.track", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--tracking_uri", help="MLflow store (default: sqlite:///OUT/mlruns.db)")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    uri = options.tracking_uri or tracking_store(out)
    try:
        outline = read_outline(out)
        open_store(uri, out=out)
        log_missing(out, outline=outline, uri=uri, say=print)
        log_report(out, study=outline["study"], uri=uri, say=print)
    except InputError as error:
        parser.exit(1, f"Stopped: {error}\n")
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
