"""The checks. ``nox`` runs lint, types, tests and wheel with the Python that called it."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests", "wheel"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).resolve().parent
LARGEST_WHEEL = 15e6  # bytes
PEERS = ("nnunetv2", "monai", "torchio")
FAST = (
    *("agreement", "components", "config", "detection", "files", "kits", "links", "losses", "measure", "nifti"),
    *("postprocess", "project", "resample", "scoring", "splits", "surface", "windows", "words"),
)
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")


def install(session: nox.Session, *packages: str, group: str | None = None) -> None:
    """Install packages and a dependency group of pyproject.toml, all in the tested versions."""
    tools = nox.project.dependency_groups(PYPROJECT, group) if group else ()
    session.install("-c", str(ROOT / "constraints.txt"), *packages, *tools)


@nox.session
def lint(session: nox.Session) -> None:
    """Style (ruff) and who may import whom (import-linter); reads the sources only, so it needs no torch."""
    install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, with the packages whose own types the code builds on."""
    install(session, "-e", ".[service]", group="types")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Pytest in two processes; arguments after ``--`` go to pytest."""
    install(session, "-e", ".", group="tests")
    session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session(python=nox.project.python_versions(PYPROJECT))
def versions(session: nox.Session) -> None:
    """The tests on every supported Python that is installed; arguments after ``--`` go to pytest."""
    tests(session)


@nox.session
def lowest(session: nox.Session) -> None:
    """The fast tests with the oldest supported versions of the direct dependencies (torch: the tested one)."""
    install(session, "uv")
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE).group()
    tools = nox.project.dependency_groups(PYPROJECT, "tests")
    session.run_install("uv", "pip", "install", "--resolution", "lowest-direct", torch, "-e", ".", *tools)
    _fast_tests(session)


def _fast_tests(session: nox.Session) -> None:
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in FAST]
    session.run("pytest", "-n", "2", "-m", "not slow", *files, *session.posargs)


@nox.session
def quick(session: nox.Session) -> None:
    """Style, imports and the fast tests: under 90 seconds once its environment is there."""
    lint(session)
    install(session, "-e", ".", group="tests")
    _fast_tests(session)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site in site/: warnings, such as broken links, are errors."""
    install(session, "-e", ".", group="docs")
    session.run("python", "docs/commands_page.py")
    session.run("mkdocs", "build", "--strict")


@nox.session
def build(session: nox.Session) -> None:
    """The sdist, and the wheel made from it, in dist/."""
    install(session, group="build")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation")


@nox.session(requires=["build"], reuse_venv=False)
def wheel(session: nox.Session) -> None:
    """Install the wheel into a clean environment and use it outside the checkout."""
    (built,) = (ROOT / "dist").glob("*.whl")
    check_contents(session, built)
    install(session, str(built))
    with TemporaryDirectory() as folder, session.chdir(folder):
        session.run("kitseg", "--help")
        session.run("kitseg", "methods")
        session.run("kitseg", "demo", "--quick", "--train")


def check_contents(session: nox.Session, built: Path) -> None:
    """Make sure that the wheel has the kernels, the built-in network, the sample, and the licenses that it names."""
    with ZipFile(built) as wheel:
        sizes = {entry.filename: entry.compress_size for entry in wheel.infolist()}
    names = PYPROJECT["project"]["license"].split(" AND ")[1:]
    wanted = ["native/kernels.abi3.so"] if platform.machine() == "x86_64" and shutil.which("g++") else []
    wanted += ["models/builtin.kitseg", "samples/hcc_007b/imaging.nii.gz", "/LICENSE"]
    wanted += [f"LICENSES/{name}.md" for name in names]
    if missing := [name for name in wanted if not any(file.endswith(name) for file in sizes)]:
        session.error(f"the wheel lacks {', '.join(missing)}")
    if (network := sizes["kitseg/models/builtin.kitseg"]) > 12e6 or built.stat().st_size > LARGEST_WHEEL:
        session.error(f"the wheel has {built.stat().st_size} bytes, its network {network}: more than agreed")


@nox.session
def native(session: nox.Session) -> None:
    """The kernels under sanitizers, 10,000 random shapes, the memory over 100 predictions; needs GCC."""
    install(session, "-e", ".", group="tests")
    folder = Path(session.create_tmp())
    flags = "-O1 -g -std=c++17 -fPIC -shared -pthread -ffp-contract=fast -fsanitize=address,undefined"
    library = str(folder / "kernels.so")
    undefined = "-fno-sanitize-recover=all"
    source = str(ROOT / "kitseg" / "native" / "kernels.cpp")
    session.run("g++", *flags.split(), undefined, source, "-o", library, external=True)
    runtime = session.run("g++", "-print-file-name=libasan.so", external=True, silent=True).strip()
    watched = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "KITSEG_KERNELS": library}
    session.run("pytest", "-p", "no:cacheprovider", "tests/test_native.py", env=watched)
    session.run("python", "tests/random_kernels.py", "500", env=watched)
    session.run("python", "tests/random_kernels.py", "10000")
    session.run("python", "tests/leak_predictions.py", "100")


@nox.session
def onnx(session: nox.Session) -> None:
    """ONNX files of the built-in network and of a quick run of every method predict scans as PyTorch does."""
    install(session, "-e", ".", group="tests")
    sample = ROOT / "kitseg" / "samples" / "hcc_007b" / "imaging.nii.gz"
    session.run("python", str(ROOT / "tests" / "onnx_methods.py"), "builtin", str(sample))
    session.run("python", str(ROOT / "tests" / "onnx_methods.py"))


@nox.session
def container(session: nox.Session) -> None:
    """The container of docs/grand-challenge on the sample: built and run, or without docker its steps one by one."""
    install(session, "simpleitk", "numpy")
    session.run("python", str(ROOT / "tests" / "container.py"))


@nox.session
def service(session: nox.Session) -> None:
    """`kitseg serve` under load: 50 requests from 8 clients between hostile ones, memory, a restart, a kill."""
    install(session, "-e", ".", "psutil", group="tests")
    session.run("python", str(ROOT / "tests" / "service_load.py"))


@nox.session
def pacs(session: nox.Session) -> None:
    """Orthanc, installed by apt-get where it is missing, sends a CT to `kitseg serve --dicom`; results are checked."""
    programs = {"orthanc": "Orthanc", "dicom3tools": "dciodvfy"}
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    if missing := [package for package, program in programs.items() if not shutil.which(program, path=path)]:
        if not shutil.which("apt-get"):
            session.error(f"{' and '.join(missing)} (Debian packages) are missing, and there is no apt-get")
        session.run("apt-get", "install", "-y", "--no-install-recommends", *missing, external=True)
    install(session, "-e", ".", group="tests")
    session.run("python", str(ROOT / "tests" / "pacs.py"))


@nox.session
def notebooks(session: nox.Session) -> None:
    """Execute copies of the notebooks."""
    install(session, "-e", ".", group="notebooks")
    with TemporaryDirectory() as folder:
        for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
            copy = shutil.copy(notebook, folder)
            session.run("jupyter", "execute", "--kernel_name=python3", copy)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure kitseg beside its peers and write docs/explanation/benchmarks.md; arguments after ``--`` name rows."""
    install(session, "-e", ".", group="bench")
    peers = [f"--python={peer}={_peer(session, peer)}" for peer in PEERS]
    session.run("python", str(ROOT / "tests" / "bench" / "run.py"), *peers, *session.posargs)


def _peer(session: nox.Session, package: str) -> Path:
    """The Python of an environment that holds one peer, made once."""
    folder = ROOT / ".nox" / f"bench-{package}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        session.run_install("python", "-m", "venv", "--clear", str(folder))
        constraints = str(ROOT / "constraints.txt")
        session.run_install(str(python), "-m", "pip", "install", "-c", constraints, package, external=True)
        (folder / "installed").touch()
    return python
