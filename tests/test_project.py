from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_shipped() -> None:
    modules = (ROOT / "kitseg").rglob("*.py")
    assert {module.parent for module in modules if not (module.parent / "__init__.py").is_file()} == set()


def test_pages_that_the_sources_name_exist() -> None:
    sources = [*(ROOT / "kitseg").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.md")]
    named = {(source.name, page) for source in sources for page in re.findall(r"docs/[\w./-]+\.md", source.read_text())}
    assert len(named) > 10
    assert {(source, page) for source, page in named if not (ROOT / page).is_file()} == set()


def test_modules_that_the_pages_name_exist() -> None:
    text = "".join((ROOT / page).read_text() for page in ("CONTRIBUTING.md", "docs/explanation/design.md"))
    named = set(re.findall(r"`((?:kitseg/)?[a-z_]+/[a-z_0-9]+)`", text)) - {"tests/bench"}
    assert len(named) > 20
    found = {name: ROOT / "kitseg" / name.removeprefix("kitseg/") for name in named if not name.startswith("conf/")}
    assert {name for name, path in found.items() if not (path.is_dir() or path.with_suffix(".py").is_file())} == set()


def test_configuration_and_types_are_found_in_the_installed_package() -> None:
    assert files("kitseg").joinpath("py.typed").is_file()
    sources = sorted((ROOT / "conf").rglob("*.yaml"))
    assert sources
    for source in sources:
        shipped = files("kitseg.conf").joinpath(*source.relative_to(ROOT / "conf").parts)
        assert shipped.read_text() == source.read_text()


def test_each_license_has_its_text() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, *others = project["license"].split(" AND ")
    assert (first, project["license-files"]) == ("Apache-2.0", ["LICENSE", "LICENSES/*.md"])
    assert {f"{name}.md" for name in others} == {path.name for path in (ROOT / "LICENSES").iterdir()}


def test_commands_start_without_torch() -> None:
    light = ["kitseg", "kitseg.cli"]
    for package in ("volumes", "scoring"):
        light += [f"kitseg.{package}.{path.stem}" for path in sorted((ROOT / "kitseg" / package).glob("[a-z]*.py"))]
    code = f"import sys, {', '.join(light)}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "torchio", "pytorch_lightning", "matplotlib"} & set(imported)


def test_nothing_grows_too_large() -> None:
    """Files and functions (but commands, which have many options) fit a reader; no package is most of the project."""
    sizes: dict[str, int] = {}
    for path in sorted((ROOT / "kitseg").rglob("*.py")):
        text, parts = path.read_text(), path.relative_to(ROOT / "kitseg").parts
        lines = len(text.splitlines())
        assert lines <= 300, path
        sizes[parts[0]] = sizes.get(parts[0], 0) + lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and parts[0] != "cli":
                assert (node.end_lineno or 0) - node.lineno < 50, f"{path}: {node.name}"
    assert max(sizes.values()) <= 0.2 * sum(sizes.values()), sizes
