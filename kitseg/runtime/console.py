"""What the user sees: bars with the time left, tables, one line an outcome."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kitseg.errors import printable

WIDTH_IN_A_FILE = 120


#: For terminals whose encoding lacks these characters.
_PLAIN = {"✓": "ok", "✗": "error:", "→": "->", "–": "-", "−": "-", "×": "x", "…": "...", "±": "+/-"}


class SafeConsole(Console):
    """A console on which no file's name moves the cursor or changes colours, and whose reader may go away.

    lost: why text could not be written; the work continues without it.
    """

    lost: OSError | None = None

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:  # such as a full disk
            self.lost = error
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Print nothing more after the reader (such as ``head -1``) has ended; the work continues."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)

    def render_str(self, text: str, **style: Any) -> Text:
        """Text with its control characters spelt out, but for ends of lines."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **style)


out = SafeConsole(width=None if Console().is_terminal else WIDTH_IN_A_FILE)
err = SafeConsole(stderr=True)


def accept_any_encoding() -> None:
    """From now on print characters that the encoding of the streams lacks in another form, instead of failing."""
    codecs.register_error("kitseg", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kitseg")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in text), error.end


def print_line(text: str) -> None:
    """One line."""
    out.print(text, soft_wrap=True, highlight=False)


def print_plain(text: str) -> None:
    """Text as it stands: square brackets in it, such as in a path, mean nothing."""
    print_line(escape(text))


def print_error(text: str) -> None:
    """A line on the error stream, or the lines of a ``KitsegError``; other control characters are escaped."""
    err.print(f"[red]✗[/] {escape(text)}", soft_wrap=True, highlight=False)


@contextmanager
def silent() -> Iterator[None]:
    """Print nothing but errors inside the block."""
    before, out.quiet = out.quiet, True
    try:
        yield
    finally:
        out.quiet = before


def table(*columns: str) -> Table:
    """An empty table whose first column is never cut."""
    made = Table(box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        made.add_column(column, no_wrap=number == 0)
    return made


@contextmanager
def bar(title: str, total: int, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A progress bar, or none; the function it gives moves it by one."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=out, transient=True, disable=not shown
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def cell(value: Any) -> str:
    """A table cell: numbers short, sequences spaced, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return " ".join(cell(part) for part in value)
    if isinstance(value, float):
        return f"{value:z.4f}" if abs(value) <= 1 else f"{value:.4g}"
    return str(value)
