# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pack a bundle for the model zoo: a zip, its entry in the list of releases, and a folder for Hugging Face.

    python -m zoo.pack swin_unetr_btcv_seg --models /runs/btcv/models
    python -m zoo.pack swin_unetr_msd --task Task09_Spleen --models /runs/spleen/models

The same files always give the same bytes. A package that would not work in a client is refused before anything is
written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bundles.common.errors import InputError, report_input_errors
from bundles.common.files import atomic_path

from .checks.bundle_process import run_checks
from .checks.file_checks import check_labels, check_paths, check_version, read_metadata
from .package.archive import file_hash, write_archive
from .package.bundle_files import copy_bundle, find_bundle
from .package.flat_task import MSD, Task, find_task, flat_name, flatten, task_names, write_trained_row
from .package.json_copies import write_json_copies
from .package.large_files import LARGE, large_files, list_large_files
from .package.model_card import write_hugging_face
from .package.names import check_name
from .package.packed_weights import copy_weights, read_weights
from .package.release_index import INDEX, add_to_index, released
from .package.trained_settings import set_trained_defaults
from .package.weights_note import add_weights_note

OUT = Path(__file__).resolve().parent / "out"


@dataclass(frozen=True)
class Package:
    """Result of `pack`.

    Attributes:
        name: name of the bundle.
        version: version of the bundle.
        archive: path of the zip.
        checksum: SHA-1 of the zip.
        hugging_face: folder with the layout of a Hugging Face repository.
        released_before: whether the list of releases already contained this package with the same checksum.
        left_out: large files that are not in the zip.
        too_large: files in the zip that are over the zoo's size limit.
    """

    name: str
    version: str
    archive: Path
    checksum: str
    hugging_face: Path
    released_before: bool
    left_out: tuple[str, ...]
    too_large: tuple[str, ...]


def stage(
    bundle: str | Path,
    *,
    folder: Path,
    task: str | None = None,
    models: Path | None = None,
    half: bool = False,
    about: Path | None = None,
) -> Path:
    """Assemble a bundle as it will be packed, and check everything that does not require building its network.

    Args:
        bundle: name of a bundle of this repository, or a bundle's folder.
        folder: parent of the new folder.
        task: for ``swin_unetr_msd``: a name in its table, or a YAML file with one row.
        models: folder with ``model.pt``; None: the bundle's own ``models``.
        half: whether to store the weights in half precision, see `packed_weights.copy_weights`.
        about: Markdown about the weights for the README, see `weights_note.add_weights_note`.

    Returns:
        The new folder.

    Raises:
        InputError: the package would not work; see the functions called here.
    """
    source = find_bundle(bundle)
    chosen = _choose_task(source, task)
    name = flat_name(chosen.name) if chosen is not None and source.name == MSD else source.name
    check_name(name)
    weights = read_weights(source / "models" if models is None else models)
    target = folder / name
    copy_bundle(source, target)
    if chosen is not None:
        row = write_trained_row(target / "configs", chosen, weights)
        if source.name == MSD:
            flatten(target, chosen, row)
    copy_weights(source.name, weights.path.parent, target / "models", half=half)
    set_trained_defaults(target / "configs", weights)
    write_json_copies(target / "configs")
    add_weights_note(target / "docs" / "README.md", weights, packed=target / "models" / "model.pt", about=about)
    list_large_files(target, None)
    check_labels(target)
    check_paths(target)
    check_version(target)
    return target


def pack(
    bundle: str | Path,
    *,
    out: Path = OUT,
    task: str | None = None,
    models: Path | None = None,
    url_prefix: str | None = None,
    large_files_url: str | None = None,
    half: bool = False,
    about: Path | None = None,
) -> Package:
    """Pack a bundle; nothing is written if a check fails.

    Args:
        bundle, task, models, half, about: see `stage`.
        out: folder for ``NAME_vVERSION.zip``, ``model_info.json`` and ``huggingface/NAME``.
        url_prefix: URL of the folder where the zip will be published, for ``model_info.json``; None: see
            `release_index.add_to_index`.
        large_files_url: exclude weights over 25 MB from the zip. Clients download them from this URL plus
            ``/models/model.pt``.

    Raises:
        InputError: see `stage`; or the weights do not fit the network, this version was released with other bytes, or
            ``out`` is a file.
    """
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--out {out}: {existing} is a file. Pass a folder.")
    with tempfile.TemporaryDirectory(prefix="zoo_pack_") as work:
        staged = stage(bundle, folder=Path(work), task=task, models=models, half=half, about=about)
        for check, failure in run_checks(staged, ["weights fit network_def"]):
            if failure:
                given = find_bundle(bundle) / "models" if models is None else models
                message = failure.replace(str(staged / "models"), str(given))
                raise InputError(f"The check '{check}' failed: {message}")
        left_out = list_large_files(staged, large_files_url)
        too_large = [name for name in large_files(staged) if name not in left_out]
        version = read_metadata(staged)["version"]
        package = f"{staged.name}_v{version}"
        archive, index = out / f"{package}.zip", out / INDEX
        with atomic_path(archive) as temporary:
            write_archive(staged, temporary, leave_out=frozenset(left_out))
            checksum = file_hash(temporary, "sha1")
            before = released(index, package=package, checksum=checksum)
        hugging_face = out / "huggingface" / staged.name
        write_hugging_face(staged, hugging_face)
        add_to_index(index, package=package, checksum=checksum, url_prefix=url_prefix)
    return Package(staged.name, version, archive, checksum, hugging_face, before, tuple(left_out), tuple(too_large))


def _choose_task(source: Path, task: str | None) -> Task | None:
    """Return the task to pack; None for a bundle without tasks."""
    table = source / "configs" / "tasks.yaml"
    names = task_names(table) if table.is_file() else []
    if task is not None and len(names) < 2 and task not in names:
        tasks = f"only the task {names[0]}" if names else "no tasks"
        raise InputError(f"--task {task}: {source.name} has {tasks}. Remove --task, or pack {MSD}.")
    if task is None and len(names) > 1:
        raise InputError(
            f"{source.name} has many tasks, but clients support one per bundle. Select it with --task, such as --task Task09_Spleen, "
            "or pass a YAML file with your own row."
        )
    return find_task(task or names[0], table) if names else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m zoo.pack", description="Pack a bundle for the model zoo.")
    add = parser.add_argument
    add("bundle", metavar="NAME", help="bundle of this repository, or a bundle's folder")
    add(
        "--task",
        help=f"for {MSD}: the task to pack, such as Task09_Spleen, or a YAML file with your own row",
    )
    add("--models", type=Path, metavar="DIR", help="folder with model.pt (default: the bundle's own models/)")
    add("--out", type=Path, default=OUT, metavar="DIR", help="folder for the packages (default: zoo/out)")
    add(
        "--url_prefix",
        metavar="URL",
        help="URL of the folder where the zip will be published, for model_info.json (default: only the file's name)",
    )
    add(
        "--large_files_url",
        metavar="URL",
        help="exclude weights over 25 MB from the zip; clients download them from URL/models/model.pt",
    )
    add("--about", type=Path, metavar="FILE.md", help="data, licence, scores and limits of the weights, for the README")
    add(
        "--half",
        action="store_true",
        help="store the weights in half precision: half the size, rounded to three digits",
    )
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        package = pack(**vars(given))
    except InputError as error:
        console.print(f"Stopped: {error}", markup=False)
        return 1
    entry = "unchanged, same bytes as before" if package.released_before else "added"
    lines = [
        f"{package.archive}  {package.archive.stat().st_size / 1e6:.1f} MB, sha1 {package.checksum}",
        f"{package.archive.parent / INDEX}  {package.name}_v{package.version}: {entry}",
        f"{package.hugging_face}  for Hugging Face, tag {package.version}",
        *(f"{name} is not in the zip: publish it at {given.large_files_url}/{name}" for name in package.left_out),
        *(
            f"{name} is over {LARGE / 1e6:.0f} MB, the zoo's limit, so the check 'sizes' of zoo.verify fails. For the zoo, pack with --large_files_url URL"
            for name in package.too_large
        ),
        # a zip without its weights is not complete, so it cannot be verified
        f"Verify it: python -m zoo.verify {package.hugging_face if package.left_out else package.archive}",
    ]
    for line in lines:
        console.print(line, markup=False)
    return 0


if __name__ == "__main__":
    report_input_errors()
    sys.exit(main())
