"""YAML and JSON from anybody, wherever an option names it: refused before it takes long to read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import kitseg

from kitseg import config
from kitseg.errors import InputError
from kitseg.labels import find_scheme
from kitseg.plain_files import read_yaml

TEXTS = {
    "deep": "[" * 400_000,
    "digits": "kidney: 1" + ":1" * 450_000,
    "long": f"kidney: {'1' * 10_000}",
    "aliases": "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "a: &a [1, *a]",
    "lists": '{"labels": {"kidney": ' + "[" * 100_000,
    "names": '{"a":' * 100_000,
    "bool": "kidney: !!bool maybe",
    "int": "kidney: !!int ''",
    "time": "kidney: !!timestamp x",
    "base 60": f"kidney: {':'.join(['1'] * 300)}.5",
}


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_hostile_files(what: str, ending: str, tmp_path: Path) -> None:
    path, begun = tmp_path / f"a.{ending}", time.process_time()
    path.write_text(TEXTS[what])
    with pytest.raises(InputError, match=r"can't be used as a label scheme"):
        find_scheme(str(path))
    if ending == "yaml":
        with pytest.raises(InputError, match=r"can't be used as a method"):
            config.sizes(str(path))
    assert time.process_time() - begun < 2


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TEXTS["deep"])
    done = kitseg(tmp_path, "measure", "maps", "--labels=a.yaml")
    assert (done.code, "more than 50000 bytes" in done.text) == (1, True), done.text


def test_aliases_of_a_method_count_with_all_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: [1, 2]}\nb: {<<: *a, y: *a}")
    assert read_yaml(tmp_path / "a.yaml", aliases=True)["b"] == {"x": [1, 2], "y": {"x": [1, 2]}}
    (tmp_path / "a.yaml").write_text(f"a: &a [{'1, ' * 600}]\nb: [*a, *a]\n")
    assert len(read_yaml(tmp_path / "a.yaml", aliases=True)["b"]) == 2
    (tmp_path / "a.yaml").write_text(f"a: &a [{'1, ' * 600}]\nb: [*a, *a, *a]\n")
    with pytest.raises(ValueError, match="too many values"):
        read_yaml(tmp_path / "a.yaml", aliases=True)
