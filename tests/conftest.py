"""Settings and fixtures of all tests."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch: the tests share the cores
# PyTorch makes this folder among the temporary files when it is imported, which tests of what is left there would see
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "torchinductor")))

#: A network that trains in seconds: the two-phase method on very coarse grids.
SMALLEST = (
    "--method=two-phase",
    "--size=tiny",
    "--set=size.slice_factor=4",
    "--set=size.inplane_factor=8",
    "--set=size.vnet_width=4",
    "--set=size.epochs=4",
    "--set=size.validate_every=2",
    "--set=stages.coarse.grid.slices=6",
    "--set=stages.coarse.grid.inplane=6.25",
    "--set=size.coarse_samples=12",
    "--set=size.keep_best=5",
    "--set=size.fine_samples=4",
    "--set=size.learning_rate=3e-3",
)


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    text: str


def kitseg(cwd: Path, *arguments: str) -> Result:
    """Run the command line in this process, in a folder."""
    from kitseg.cli import main

    printed, code = io.StringIO(), 0
    old = sys.argv
    sys.argv = ["kitseg", *arguments]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = old
    return Result(code, printed.getvalue())


def kitseg_process(cwd: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "kitseg", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real label maps and a real CT, which are not part of the project."""
    folder = Path(os.environ.get("KITSEG_SHARED", Path(__file__).parents[2] / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set KITSEG_SHARED to the folder that holds it)")
    return folder


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first worker to ask for it makes, and all workers share."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (folder / "ready").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "ready").touch()
    return folder


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler], **state: Any) -> Iterator[ThreadingHTTPServer]:
    """A web server on a port of this machine, in a thread, with these attributes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        vars(server).update(state)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six labelled phantoms in ``data`` and two more in ``test``."""

    def make(folder: Path) -> None:
        for name, count, seed in (("data", 6, 0), ("test", 2, 1)):
            made = kitseg(folder, "phantom", name, f"--cases={count}", f"--seed={seed}", "--matrix=64", "--jobs=1")
            assert made.code == 0, made.text

    return once(tmp_path_factory, "phantoms", make)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A working folder with those phantoms and a finished run, ``runs/two-phase-tiny``."""

    def make(folder: Path) -> None:
        for name in ("data", "test"):
            (folder / name).symlink_to(phantoms / name)
        done = kitseg(folder, "train", *SMALLEST, "--jobs=1")
        assert done.code == 0, done.text

    return once(tmp_path_factory, "trained", make)
