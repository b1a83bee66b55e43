"""What a configuration may hold: plain values, and parts that kitseg may build.

Files that others send (runs, ensemble files, bundles, folders of probabilities) may name kitseg's own parts, PyTorch's
layers, losses and optimizers, and TorchIO's transforms. Any other part is built only if

- its configuration was composed on the command line, in this process or the one that started it;
- `kitseg train` composed the same part for this user before: the hash of its configuration is the name of a file in
  ``kitseg/trusted`` of the user's state folder (``XDG_STATE_HOME``, or ``~/.local/state``), which holds the folder that
  its Python code lies in; or
- the user gives ``--trust``.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from kitseg.errors import InputError, UsageError

PARTS = re.compile(
    r"kitseg\.((nets|losses|links|stages|postprocess)\.[a-z]\w*|patches\.(samplers|elastic)|inference\.windows)\.[A-Z]\w*"
    r"|torch\.(nn|optim|optim\.lr_scheduler)\.[A-Z]\w*"
    r"|torchio\.Random[A-Z]\w*",
    re.ASCII,
)
APPROVED = "KITSEG_APPROVED"  # hashes and targets of parts, or EVERYTHING; child processes inherit it
EVERYTHING = "*"
_folders: list[str] = []  # of the user's own Python code


def parse(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: not YAML, or with tags or aliases, by which a small text can become objects or a huge value.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it holds an alias")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump(content: Any) -> str:
    """Plain values as YAML that ``parse`` reads: a value that occurs twice is written twice."""
    text: str = yaml.dump(content, Dumper=_Plain, sort_keys=False, allow_unicode=True)
    return text


class _Plain(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    def ignore_aliases(self, data: Any) -> bool:
        return True


def check_file(path: Path, content: Any) -> None:
    """``check`` what a file from anybody holds.

    Raises:
        InputError: an interpolation, or a part that must not be built.
    """
    try:
        check(content)
    except UsageError as error:
        raise InputError(path, str(error), "Otherwise restore the file.") from error


def check(spec: Any) -> None:
    """Make sure that no text asks for an interpolation, and that every part may be built here.

    Raises:
        UsageError: an interpolation, or a part that must not be built.
    """
    _check_plain(spec)
    for part in _foreign(spec):
        if not (_is_approved(_digest(part)) or _is_recorded(part)):
            raise _untrusted(str(part["_target_"]))
    approve(spec)


def check_before_build(spec: Any) -> None:
    """Make sure that each part passed ``check``, or is a class defined in the module of kitseg, PyTorch or TorchIO.

    Raises:
        UsageError: a function, something that the module merely imports, or nothing at all.
    """
    _check_plain(spec)
    for target in _targets(spec):
        if not PARTS.fullmatch(target):
            if not _is_approved(target):
                raise _untrusted(target)
            continue
        module, _, name = target.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"the configuration names {target!r}, which does not exist") from error
        if not isinstance(found, type) or not f"{found.__module__}.".startswith(f"{module}."):
            raise _untrusted(target)


def approve(spec: Any) -> None:
    """Let this process and its children build the parts of a configuration that the user composed."""
    known = os.environ.get(APPROVED, "").split()
    new = [entry for part in _foreign(spec) for entry in (_digest(part), *_targets(part))]
    if new:
        os.environ[APPROVED] = " ".join(dict.fromkeys([*known, *filter(re.compile(r"[\w.]+").fullmatch, new)]))


@contextmanager
def everything() -> Iterator[None]:
    """Approve the parts of every file that is read inside the block: ``--trust``."""
    os.environ[APPROVED] = f"{os.environ.get(APPROVED, '')} {EVERYTHING}"
    try:
        yield
    finally:
        os.environ[APPROVED] = " ".join(entry for entry in os.environ[APPROVED].split() if entry != EVERYTHING)


def record(spec: Any) -> str | None:
    """Record that this user trained with the parts of a configuration; they need no ``--trust`` afterwards.

    Returns:
        In one line, why it could not be recorded; None where it was, or there are only parts of kitseg.
    """
    try:
        for part in _foreign(spec):
            path = _records() / _digest(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text("".join(f"{folder}\n" for folder in _folders), encoding="utf-8")
            partial.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = " ".join(str(error).split())
        return f"your own parts could not be recorded ({reason}): commands that open this run need --trust"
    return None


def import_from(folder: Path) -> None:
    """Search a folder for Python modules, too, after all others."""
    if (text := str(folder)) not in _folders:
        _folders.append(text)
    if text not in sys.path:
        sys.path.append(text)


def name(text: Any) -> str:
    """A name that may become part of a path or of a line on the screen.

    Raises:
        UsageError: other characters, or too many.
    """
    if not isinstance(text, str) or not re.fullmatch(r"\w[\w-]{0,63}", text, re.ASCII):
        raise UsageError(f"{text!r} is not a name: it takes letters, digits, - and _")
    return text


def is_line(text: Any) -> bool:
    """Whether this is a text for a line on the screen."""
    return isinstance(text, str) and 0 < len(text) <= 200 and text.isprintable()


def _untrusted(target: str) -> UsageError:
    problem = f"the configuration names {target!r}, which is not a part that kitseg builds from"
    return UsageError(f"{problem}; if you trust its author, add --trust, which runs such code")


def _records() -> Path:
    """Where the hashes of a user's own parts are."""
    stated = os.environ.get("XDG_STATE_HOME", "")
    base = Path(stated) if os.path.isabs(stated) else Path.home() / ".local" / "state"
    return base / "kitseg" / "trusted"


def _is_approved(entry: str) -> bool:
    approved = os.environ.get(APPROVED, "").split()
    return entry in approved or EVERYTHING in approved


def _is_recorded(part: Mapping[str, Any]) -> bool:
    """Whether this user trained with a part; its code's folders are then searched for modules."""
    try:
        folders = (_records() / _digest(part)).read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError, UnicodeError):
        return False
    for folder in folders:
        import_from(Path(folder))
    return True


def _digest(part: Mapping[str, Any]) -> str:
    """The hash of a part with all its arguments."""
    return hashlib.sha256(dump(dict(part)).encode()).hexdigest()


def _foreign(spec: Any) -> list[Mapping[str, Any]]:
    """The outermost parts that are not on the list of ``PARTS``."""
    if isinstance(spec, Mapping) and "_target_" in spec and not PARTS.fullmatch(str(spec["_target_"])):
        return [spec]
    below = spec.values() if isinstance(spec, Mapping) else spec if isinstance(spec, list | tuple) else ()
    return [part for value in below for part in _foreign(value)]


def _check_plain(spec: Any) -> None:
    for text in _everything_in(spec):
        if isinstance(text, str) and "${" in text:
            raise UsageError(f"the configuration holds {text!r}, which is not a plain value")


def _targets(spec: Any) -> list[str]:
    return [str(part["_target_"]) for part in _everything_in(spec) if isinstance(part, Mapping) and "_target_" in part]


def _everything_in(spec: Any) -> Iterator[Any]:
    """A value, and all keys and values below it."""
    todo = [spec]
    while todo:
        yield (part := todo.pop())
        if isinstance(part, Mapping):
            todo += [*part.values(), *part]
        elif isinstance(part, list | tuple):
            todo += part
