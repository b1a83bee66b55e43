"""Failures of the machine in one line each, with a remedy."""

from __future__ import annotations

import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import kitseg

from kitseg.cli import app
from kitseg.errors import InputError, KitsegError, UsageError, fault, format_error, printable
from kitseg.runtime import console
from kitseg.runtime.outcomes import Outcome, each
from kitseg.types import Case, Geometry
from kitseg.volumes.nifti import write_image

OPTION = re.compile(r"--[a-z][a-z-]*")


@pytest.mark.parametrize(
    ("number", "problem", "remedy"),
    [
        (errno.ENOSPC, "the disk is full", "Free some space"),
        (errno.EDQUOT, "the disk quota is used up", "Free some space"),
        (errno.EROFS, "the file system is read-only", "writable"),
        (errno.EACCES, "permission denied", "that you may read and write"),
        (errno.EMFILE, "too many files are open", "--jobs"),
        (errno.ENOMEM, "out of memory", "--max-memory"),
        (errno.ETIMEDOUT, "the network or a network folder does not respond", "again"),
        (errno.ENOTCONN, "the network or a network folder was lost", "again"),
    ],
)
def test_system_errors(number: int, problem: str, remedy: str) -> None:
    line = format_error("case_00000", OSError(number, os.strerror(number)))
    assert line.startswith(f"case_00000: {problem}. ")
    assert remedy in line


@pytest.mark.parametrize("fill", [lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**60, dtype=torch.uint8)])
def test_out_of_memory(fill: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        fill()
    assert "out of memory. Free some" in format_error("a", caught.value)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), *(OSError(number, "") for number in (errno.EMFILE, errno.ENFILE)), torch.OutOfMemoryError("")],
)
def test_remedies_name_only_options_that_commands_have(error: Exception) -> None:
    """Options of only some commands follow "with one of these options, if it has them"."""
    commands = typer.main.get_command(app).commands.values()
    options = [{name for parameter in command.params for name in parameter.opts} for command in commands]
    asked, _, offered = format_error("a", error).partition("with one of these options, if it has them: ")
    assert set(OPTION.findall(asked)) <= set.intersection(*options)
    assert set() < set(OPTION.findall(offered)) <= set.union(*options)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shape"), OSError("odd"), OSError(errno.EBADF, "bad")])
def test_unexpected_errors_show_their_type(error: Exception) -> None:
    assert fault(error) is None
    assert format_error("a", error).startswith(f"a: {type(error).__name__}: ")


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("service", ("serve",)),
        ("onnx", ("export", "builtin", "-o", "onnx", "--format=onnx")),
        ("cluster", ("preprocess", "data", "--size=tiny", "--cluster=dask://localhost:1")),
        ("openvino", ("predict", "data", "--engine=openvino")),
        ("wandb", ("train", "--size=tiny", "--set=trainer.logger=wandb", "--dry-run")),
    ],
)
def test_a_missing_extra_is_named_with_its_remedy_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, command: tuple[str, ...]
) -> None:
    (tmp_path / "data").mkdir()
    write_image(tmp_path / "data" / "a.nii.gz", np.zeros((4, 4, 4), np.int16), Geometry((4, 4, 4), np.eye(4)))
    monkeypatch.setattr("kitseg.errors.find_spec", lambda name: None)
    done = kitseg(tmp_path, *command)
    assert (done.code, f'pip install "kitseg[{extra}]" adds it' in done.text) == (2, True), done.text
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_control_characters_are_escaped() -> None:
    assert printable("a\nb\x1b[31mc\u2028\udc80 \u3000é") == "a\\nb\\x1b[31mc\\u2028\\udc80 \u3000é"
    assert str(InputError("a\nb", "is invalid", "Rename it.")) == "a\\nb: is invalid. Rename it."


def test_details_are_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """What a caller adds as a line is one; what stands in a name is escaped."""
    error = UsageError("a\nname: differs", details=["seed: 0 → 5", "name: x\x1b[2J\r → y"])
    expected = ["a\\nname: differs", "  seed: 0 → 5", "  name: x\\x1b[2J\\r → y"]
    assert str(error).split("\n") == expected
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    console.print_error(str(error))
    assert capsys.readouterr().err.rstrip("\n").split("\n") == [f"✗ {expected[0]}", *expected[1:]]


@pytest.mark.parametrize(
    ("error", "of_dicom", "of_machine"),
    [
        (ValueError("Hannelore"), "a: ValueError", False),
        (KitsegError("can't be used"), "can't be used", False),
        (OSError(errno.ENOSPC, "full"), None, True),
        (OSError(errno.EACCES, "closed"), None, False),
        (MemoryError(), None, True),
    ],
)
def test_the_error_of_a_case(error: Exception, of_dicom: str | None, of_machine: bool) -> None:
    """What was not expected may quote the patient of a DICOM series; a full disk or memory is no fault of the case."""

    def work(_: Case) -> Outcome:
        raise error

    plain, dicom = each([Case("a", Path("a.nii")), Case("a", Path("a"), slices=(Path("x"),))], work, lambda _: None)
    assert plain.error == format_error("a", error)
    assert dicom.error == (of_dicom or plain.error)
    assert plain.of_machine == dicom.of_machine == of_machine
