"""Packages of plug-ins that pip installs into a folder, used in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = "-m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation"


@pytest.fixture(scope="session")
def install(tmp_path_factory):
    """`install(source)`: a function that runs python where the package in `source` is installed."""

    def prepare(source: Path):
        folder = tmp_path_factory.mktemp("plugins")
        site = folder / "site"
        variables = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join((str(site), str(ROOT))),
        }

        def python(*command):
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                env=variables,
                cwd=folder,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
            return done.stdout

        python(*INSTALL.split(), "--no-index", "--target", site, source)
        return python

    return prepare
