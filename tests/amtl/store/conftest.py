from __future__ import annotations

import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def v1(tmp_path_factory) -> Path:
    """Runs and files of version 1, made by the code of November 2026."""
    folder = tmp_path_factory.mktemp("v1")
    # Python 3.11.4 brought it, and 3.14 takes it by itself.
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(Path(__file__).with_name("v1.tar.xz")) as archive:
        archive.extractall(folder, **safely)
    return folder
