from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "kitseg").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"kitseg.conf"}


def test_configuration_and_types_are_found_in_the_installed_package() -> None:
    assert files("kitseg").joinpath("py.typed").is_file()
    sources = sorted((ROOT / "conf").rglob("*.yaml"))
    assert sources
    for source in sources:
        shipped = files("kitseg.conf").joinpath(*source.relative_to(ROOT / "conf").parts)
        assert shipped.read_text() == source.read_text()


def test_commands_start_without_torch() -> None:
    light = ["kitseg", "kitseg.cli"]
    for package in ("volumes", "scoring"):
        light += [f"kitseg.{package}.{path.stem}" for path in sorted((ROOT / "kitseg" / package).glob("[a-z]*.py"))]
    code = f"import sys, {', '.join(light)}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "torchio", "pytorch_lightning", "matplotlib"} & set(imported)
