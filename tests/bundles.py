"""Model bundles as files in memory, and how a hostile one is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import pytest
from method_runs import untrained

from kitseg.models.bundles.archive import MANIFEST
from kitseg.models.bundles.export import export

Files = dict[str, bytes]
STAGE = "runs/0/fold_0/kidneys"
WEIGHTS = f"{STAGE}/best/0.safetensors"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def content(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a sound bundle."""
    path = tmp_path_factory.mktemp("bundle") / "sound.kitseg"
    export(run, path)
    with ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack(path: Path, files: Files, stated: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """A bundle of these files whose manifest states their hashes, unless ``stated`` changes it."""
    manifest = json.loads(files[MANIFEST])
    rest = {name: data for name, data in files.items() if name != MANIFEST}
    manifest["files"] = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in rest.items()}
    stated(manifest)
    with ZipFile(path, "w") as archive:
        for name, data in {**rest, MANIFEST: json.dumps(manifest).encode()}.items():
            archive.writestr(ZipInfo(name), data)
    return path
