# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Python of this bundle. ``common`` is shared by the bundles: a link in the repository, real files in a packed bundle."""

from pathlib import Path

if not (Path(__file__).parent / "common" / "__init__.py").is_file():
    raise ImportError(
        f"{Path(__file__).parent / 'common'} leads nowhere: a bundle folder was copied out of the repository without what it links to. "
        "Copy it with the link followed (cp -rL), use a packed bundle, or run it inside the repository."
    )
