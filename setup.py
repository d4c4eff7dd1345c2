# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Refuse every installation but an editable one. All else about the project is in setup.cfg."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist
from setuptools.errors import SetupError

REASON = (
    "swin-unetr-bundles is used from its folder: the bundles are folders of configs and code that MONAI runs where they "
    "lie. Install it with `make install`, or with `pip install --editable .`. To share a trained bundle, pack it: "
    "docs/how-to/publish.md."
)


class NoWheel(bdist_wheel):
    """An editable installation makes its wheel in another way, without `run`."""

    def run(self) -> None:
        raise SetupError(REASON)


class NoSourceArchive(sdist):
    """An archive would lack the links between the bundles."""

    def run(self) -> None:
        raise SetupError(REASON)


setup(cmdclass={"bdist_wheel": NoWheel, "sdist": NoSourceArchive})
