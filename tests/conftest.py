"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real label maps and a real CT, which are not part of the project."""
    folder = Path(os.environ.get("KITSEG_SHARED", Path(__file__).parents[2] / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set KITSEG_SHARED to the folder that holds it)")
    return folder
