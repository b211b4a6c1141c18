"""What tests of every folder share: double precision, and where the published arrays and scans lie."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)

DATA = Path(os.environ.get("SCANSTEER_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))


def present(folder: Path) -> Path:
    """The folder, or a skipped test."""
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}; the environment variable SCANSTEER_DATA names the folder of the real scans")
    return folder


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """The folder of the two published scans."""
    return present(DATA)


@pytest.fixture(scope="session")
def physics_arrays() -> Path:
    """The folder of published reference arrays, beside that of the scans."""
    return present(DATA.parent / "physics")
