"""Typed JSON files: what is read, what is refused, and when outputs are current."""

from __future__ import annotations

import ast
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kitseg
from kitseg.errors import InputError
from kitseg.runtime import provenance
from kitseg.runtime.provenance import FileFormat, InputFile
from kitseg.types import Geometry


@dataclass(frozen=True)
class Record:
    name: str
    sizes: tuple[float, ...] = ()
    grid: Geometry | None = None
    sources: dict[str, InputFile] | None = None
    digest: str = ""


FORMAT = FileFormat(Record, 3, "Do it again.")
GRID = Geometry((1, 2, 3), np.diag([3.0, 0.5, 0.5, 1]))


def test_there_and_back(tmp_path: Path) -> None:
    FORMAT.write(tmp_path / "a.json", Record("é", (1, 2.5), GRID, {"image": InputFile(1, 2, "x")}))
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == 3
    found = FORMAT.read(tmp_path / "a.json")
    assert (found.name, found.sizes, found.sources) == ("é", (1.0, 2.5), {"image": InputFile(1, 2, "x")})
    assert found.grid is not None
    assert found.grid.same_as(GRID, 0)


def test_other_keys_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": 3, "name": "a", "later": [1]}')
    assert FORMAT.read(tmp_path / "a.json") == Record("a")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[1]", "Expected `object`"),
        (b'{"schema": 2, "name": "a"}', "schema 2, this version of kitseg reads 3"),
        (b'{"schema": "3", "name": "a"}', "`$.schema`"),
        (b'{"name": "a"}', "missing required field `schema`"),
        (b'{"schema": 3}', "missing required field `name`"),
        (b'{"schema": 3, "name": 4}', "`$.name`"),
        (b'{"schema": 3, "name": "a", "sizes": [1, "2"]}', "`$.sizes[1]`"),
        (b'{"schema": 3, "name": "a", "sizes": [true]}', "`$.sizes[0]`"),
        (b'{"schema": 3, "name": "a", "sizes": [NaN]}', "invalid character"),
        (b'{"schema": 3, "name": "a", "sizes": [1e999]}', "out of range"),
        (b'{"schema": 3, "name": "a", "grid": {"shape": [1, 2, 3], "affine": [[1]]}}', "4 x 4 numbers"),
        (b'{"schema": 3, "name": "\xff"}', "utf-8"),
        (b'{"schema": 3, "name": "a", "x": ' + b"[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        FORMAT.read(path)
    text = str(error.value)
    assert text.startswith(f"{path}: can't be read (")
    assert text.endswith(" Do it again.")
    assert words in text
    assert "\n" not in text
    assert FORMAT.find(path, {}) is None


def test_files_that_are_not_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.json", "there is no such file"), (tmp_path, "it is a folder")):
        with pytest.raises(InputError, match=words):
            FORMAT.read(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe"):
        FORMAT.read(tmp_path / "pipe")
    FORMAT.write(tmp_path / "a.json", Record("a" * 100))
    with pytest.raises(InputError, match="larger than"):
        FileFormat(Record, 3, largest=50).read(tmp_path / "a.json")


def test_outputs_are_current_while_nothing_changes(tmp_path: Path) -> None:
    source, output, path = (tmp_path / name for name in ("in", "out", "a.json"))
    source.write_text("in")
    output.write_text("out")

    def found(**made: Any) -> bool:
        return FORMAT.find(path, made, lambda record: {output: record.digest}) is not None

    def stamp() -> dict[str, InputFile]:
        return {"image": InputFile.of(source)}

    digest = provenance.file_digest(output)
    FORMAT.write(path, Record("a", sources={"image": InputFile.of(source, digest=True)}, digest=digest))
    assert found(name="a", sources=stamp())
    assert not found(name="b")
    assert not found(sources={**stamp(), "label": InputFile()})
    os.utime(source, (1, 1))
    assert not found(sources=stamp()), "another time, and no hash to compare"
    assert found(sources={"image": InputFile.of(source, digest=True)}), "the same hash"
    source.write_text("im")
    assert not found(sources={"image": InputFile.of(source, digest=True)})
    output.write_text("oui")
    assert not found(name="a")
    output.unlink()
    assert not found(name="a")


def test_no_two_public_classes_share_a_name() -> None:
    """Beside the building blocks of networks, which each paper names alike."""
    package = Path(kitseg.__file__).parent
    modules = [path for path in package.rglob("*.py") if "nets" not in path.relative_to(package).parts]
    names = Counter(
        node.name
        for path in modules
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []
