"""The errors that kitseg reports in one line instead of a traceback."""

from __future__ import annotations

from pathlib import Path


class KitsegError(Exception):
    """Something the user can mend; the message says what is wrong and what to do."""


class InputError(KitsegError):
    """A file that can't be used: names the file, the problem and the remedy."""

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path, self.problem, self.remedy = Path(path), problem, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.remedy}"


def in_words(name: Path | str, error: Exception) -> str:
    """An error in one line: its own words, or for one that nobody foresaw, what it befell and its type."""
    if isinstance(error, KitsegError):
        return str(error)
    return f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"


class UsageError(KitsegError):
    """A command that can't mean what it says (exit code 2)."""
