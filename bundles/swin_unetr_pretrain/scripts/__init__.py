# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Python of this bundle. ``common`` and ``pretraining`` are links in the repository and real folders in a packed bundle."""

from pathlib import Path

_BUNDLE = Path(__file__).parent.parent
_PARTS = [path for path in (_BUNDLE / "scripts").iterdir() if path.suffix != ".py" and path.name != "__pycache__"]
_DEAD = [path for path in _PARTS if not (path / "__init__.py").is_file()]
_DEAD += [path for path in (_BUNDLE / "configs").glob("*") if not path.exists()]

if _DEAD:
    raise ImportError(
        f"{', '.join(map(str, sorted(_DEAD)))}: dead link, it leads nowhere. The bundle folder was copied out of the repository without what "
        "it links to. Copy it with the links followed (cp -rL), use a packed bundle, or run it inside the repository."
    )
