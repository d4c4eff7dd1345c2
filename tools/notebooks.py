# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Run the notebooks of the documentation and save them with tables and pictures: python -m tools.notebooks [demo.ipynb ...]

What the commands print is not saved, because it has the times and folders of one machine. Needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

from PIL import Image

from bundles.common.files import write_text

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
LONGEST_CELL = 600  # seconds


def run(path: Path):
    """Run a notebook in its own folder, and return it with all outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell or a command in it fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    return NotebookClient(notebook, timeout=LONGEST_CELL, kernel_name="python3", resources=resources).execute()


def without_logs(notebook):
    """Remove from a notebook what its commands printed and when its cells ran; pictures get 256 colours."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            if cell.source.startswith("%%bash"):
                cell.outputs = []
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
                if "image/png" in output.get("data", {}):
                    output.data = {"image/png": few_colours(output.data["image/png"])}
                    output.metadata = {}
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def few_colours(png: str) -> str:
    """Return a PNG, in base64, with 256 colours; small patches, as in legends, keep theirs."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(arguments: list[str] | None = None) -> None:
    """Run and save notebooks from the command line."""
    parser = argparse.ArgumentParser(description="Run the notebooks of the documentation and save tables and pictures.")
    parser.add_argument("names", nargs="*", help="files in docs/notebooks (default: all)")
    for name in parser.parse_args(arguments).names or sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")):
        import nbformat

        write_text(NOTEBOOKS / name, nbformat.writes(without_logs(run(NOTEBOOKS / name))) + "\n")
        print(NOTEBOOKS / name)


if __name__ == "__main__":
    main()
