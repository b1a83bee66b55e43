"""Every kitseg call in the example scripts, the README and the docs has options and settings that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from kitseg.cli import app
from kitseg.config import compose, sizes
from kitseg.errors import UsageError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "cluster"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_ARRAY_TASK_COUNT": "8",
    "SLURM_CPUS_PER_TASK": "4",
    "METHOD": "two-phase",
    "METHODS": "two-phase progressive",
}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# sbatch runs its script at once, srun the command after its options; kitseg records its arguments
STAND_INS = {
    "sbatch": 'case "$*" in *--wrap*) bash -c "${@: -1}" ;; *) bash "${@: -1}" ;; esac > /dev/null; echo 17',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "kitseg": 'printf "%s\\0" "$@" >> "$CALLS"; printf "\\n" >> "$CALLS"',
}


def check_call(arguments: list[str]) -> None:
    """Have the command line parse a call, and Hydra its settings; an unknown option or key raises an error."""
    name, *rest = arguments
    with COMMANDS[name].make_context(name, rest) as context:
        given = context.params
    if given.get("set_") and Path(given["method"]).suffix != ".yaml":
        compose(given["method"], given["size"] or sizes(given["method"]).popitem()[0], given["set_"])


def calls_of(script: Path, folder: Path) -> Iterator[list[str]]:
    """Run a script with bash and give the kitseg calls that it makes."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    record = folder / "calls"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", script], check=True, cwd=folder, env={**ARRAY, "PATH": path, "CALLS": str(record)})
    for line in record.read_text().splitlines():
        yield line.split("\0")[:-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_calls_in_scripts_are_valid(script: Path, tmp_path: Path) -> None:
    calls = list(calls_of(script, tmp_path))
    assert calls
    for call in calls:
        check_call(call)
    if script.name == "study.sh":
        verbs = [call[0] for call in calls]
        assert verbs == [*["split", "preprocess", "preprocess"], *["train"] * 2, *["validate"] * 2, *verbs[-3:]]
        # a job that ends with 1 for one broken case must not keep the next from starting
        assert re.findall(r"(after\w+):?\$(\w+)", script.read_text()) == [
            ("afterok", "split"), ("afterany", "prepared"), ("afterany", "trained")
        ]  # fmt: skip
        assert verbs[-3:] == ["choose", "predict", "evaluate"]


def test_an_invalid_call_is_found(tmp_path: Path) -> None:
    script = tmp_path / "odd.sbatch"
    script.write_text("srun --ntasks=1 kitseg train --folds 3\n")
    (call,) = calls_of(script, tmp_path)
    with pytest.raises(Exception, match="No such option: --folds"):
        check_call(call)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_scripts_pass_shellcheck() -> None:
    subprocess.run(["shellcheck", *SCRIPTS], check=True)


def blocks(page: Path) -> list[str]:
    """The kitseg calls in a page's shell blocks."""
    text = "\n".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    return re.findall(r"^(?:\$ )?(?:srun )?kitseg ([^\n&|]*)", text.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_calls_in_pages_are_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "conf" / "labels" / "kits23.yaml", tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    for line in blocks(page):
        check_call(shlex.split(line, comments=True))


def test_an_unknown_setting_is_found() -> None:
    with pytest.raises(UsageError, match="widht"):
        check_call(["train", "--method", "two-phase", "--set", "size.widht=3"])


def test_images_copy_files_that_exist() -> None:
    recipe = (FOLDER / "kitseg.def").read_text()
    listed = re.findall(r"^    (\S+) /src/$", recipe, re.MULTILINE)
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert sorted(listed) == sorted(name[1:] for name in ignored if name.startswith("!"))
    assert all((ROOT / name).exists() for name in listed)
    licenses = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]
    assert {pattern.partition("/")[0] for pattern in licenses} <= set(listed), "those of the weights go with them"
