"""The same files from a dask cluster as from this machine; a cluster that fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALLEST, kitseg
from joblib import delayed

from kitseg.errors import KitsegError
from kitseg.runtime import dask as cluster
from kitseg.runtime.dask import on_cluster
from kitseg.runtime.outcomes import in_parallel

pytestmark = pytest.mark.slow
DASK = (sys.executable, "-m", "dask")


def dask(log: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a scheduler or workers, in the folder of their log."""
    settings = {**os.environ, **environment}
    with log.open("wb") as output:
        return subprocess.Popen(
            [*DASK, *arguments, "--no-dashboard"], cwd=log.parent, stdout=output, stderr=output, env=settings
        )


def scheduler(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A scheduler on a free port of the loopback, and its address."""
    file = folder / "scheduler.json"
    process = dask(folder / "log", "scheduler", "--host=127.0.0.1", "--port=0", f"--scheduler-file={file}")
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text().endswith("}")):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, "no scheduler"
        time.sleep(0.05)
    return process, json.loads(file.read_text())["address"].replace("tcp", "dask")


def end(*processes: subprocess.Popen[bytes]) -> None:
    """End one after the other: a worker that outlives its scheduler looks for it for a while."""
    for process in processes:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two worker processes."""
    folder = tmp_path_factory.mktemp("dask")
    head, found = scheduler(folder)
    workers = dask(folder / "workers", "worker", found.replace("dask", "tcp"), "--nworkers=2", "--nthreads=1")
    try:
        yield found
    finally:
        end(workers, head)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_cluster_makes_the_same_files(address: str, phantoms: Path, tmp_path: Path) -> None:
    data, found = phantoms / "test", []
    for name, where in (("here", "--jobs=2"), ("cluster", f"--cluster={address}")):
        folder = tmp_path / name
        folder.mkdir()
        for label in data.glob("*/segmentation.nii.gz"):
            (folder / f"{label.parent.name}.nii.gz").symlink_to(label)  # predictions that are right
        for command in (
            ("preprocess", str(data), *SMALLEST, where),
            ("evaluate", ".", str(data), "--json=scores.json", "--csv=scores.csv", where),
        ):
            done = kitseg(folder, *command)
            assert done.code == 0, done.text
        found.append(digests(folder))
    assert found[0] == found[1]
    assert len(found[0]) == 2 + 2 + 2 * 2 * 5, "labels, tables, and five files a case on each of two grids"


def test_a_killed_worker_is_reported(address: str) -> None:
    with pytest.raises(KitsegError, match="a dask worker was killed"), on_cluster(address):
        in_parallel([delayed(os._exit)(1)], 1)


def test_a_scheduler_that_is_not_there(tmp_path: Path, phantoms: Path) -> None:
    begun = time.monotonic()
    done = kitseg(tmp_path, "preprocess", str(phantoms / "data"), *SMALLEST, "--cluster=dask://127.0.0.1:9")
    assert time.monotonic() - begun < cluster.PATIENCE + 5
    assert (done.code, done.text.count("\n")) == (1, 1)
    assert "dask://127.0.0.1:9: no dask scheduler answers. Start it with `dask scheduler`" in done.text
    for odd in ("127.0.0.1:9", "dask://127.0.0.1", "tcp://127.0.0.1:9"):
        done = kitseg(tmp_path, "preprocess", str(phantoms / "data"), *SMALLEST, f"--cluster={odd}")
        assert done.code == 2
        assert "it takes the address of a dask scheduler, dask://host:port" in done.text


def test_workers_that_can_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, address = scheduler(tmp_path)
    other = tmp_path / "kitseg-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: kitseg\nVersion: 0.0.1\n")
    worker = None
    try:
        monkeypatch.setattr(cluster, "PATIENCE", 2.0)
        with pytest.raises(KitsegError, match="it has no workers"), on_cluster(address):
            pytest.fail("there is nobody to work")
        place = address.replace("dask", "tcp")
        worker = dask(tmp_path / "worker", "worker", place, "--nthreads=1", "--no-nanny", PYTHONPATH=str(tmp_path))
        monkeypatch.setattr(cluster, "PATIENCE", 30.0)
        with pytest.raises(KitsegError, match=r"worker tcp\S+ has kitseg 0\.0\.1, not "), on_cluster(address):
            pytest.fail("another version")
    finally:
        end(*(process for process in (worker, head) if process))


def test_a_cluster_without_workers_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ALONE", 2.0)
    head, address = scheduler(tmp_path)
    worker = dask(tmp_path / "worker", "worker", address.replace("dask", "tcp"), "--nthreads=1", "--no-nanny")
    try:
        monkeypatch.setattr(cluster, "PATIENCE", 30.0)
        with on_cluster(address):
            worker.kill()
            with pytest.raises(KitsegError, match="has had no workers for 2 s"):
                in_parallel([delayed(time.sleep)(60)], 1)
    finally:
        end(worker, head)


def test_a_cluster_that_is_shut_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 30.0)
    head, address = scheduler(tmp_path)
    worker = dask(tmp_path / "worker", "worker", address.replace("dask", "tcp"), "--nthreads=1", "--no-nanny")
    try:
        with on_cluster(address):
            head.kill()
            with pytest.raises(KitsegError, match="the dask cluster was shut down"):
                in_parallel([delayed(time.sleep)(60)], 1)
    finally:
        end(worker, head)
