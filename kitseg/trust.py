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
from kitseg.plain_files import DEEPEST, MOST, TOO_MANY

PARTS = re.compile(
    r"kitseg\.((nets|losses|links|stages|postprocess|augmentation)\.[a-z]\w*|patches\.(samplers|elastic|lesion_copies)|inference\.windows)\.[A-Z]\w*"
    r"|torch\.nn\.(?!\w*(RNN|LSTM|GRU|Transformer))[A-Z]\w*"  # these repeat their layers as often as a number states
    r"|torch\.optim\.(lr_scheduler\.)?[A-Z]\w*"
    r"|torchio\.Random[A-Z]\w*",
    re.ASCII,
)
APPROVED = "KITSEG_APPROVED"  # hashes and targets of parts, or EVERYTHING; child processes inherit it
EVERYTHING = "*"
_folders: list[str] = []  # of the user's own Python code


def dump(content: Any, flow: bool | None = False) -> str:
    """Plain values as YAML that ``plain_files.read_yaml`` reads: a value that occurs twice is written twice.

    flow: None for innermost lists and mappings on one line.
    """
    text: str = yaml.dump(
        content, Dumper=_Plain, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=120
    )
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
    """Make sure that the values are plain ones, few, and no interpolations, and that every part may be built here.

    Raises:
        UsageError: another value, or a part that must not be built.
    """
    _check_plain(spec)
    for part in foreign(spec):
        if not (is_approved(_digest(part)) or _is_recorded(part)):
            raise _untrusted(str(part["_target_"]))
    approve(spec)


def check_before_build(spec: Any) -> None:
    """Make sure that each part passed ``check``, or is a class defined in the module of kitseg, PyTorch or TorchIO.

    Raises:
        UsageError: a function, something that the module merely imports, or nothing at all.
    """
    _check_texts(spec)
    for target in targets(spec):
        if not PARTS.fullmatch(target):
            if not is_approved(target):
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
    new = [entry for part in foreign(spec) for entry in (_digest(part), *targets(part))]
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
        for part in foreign(spec):
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


def is_approved(entry: str) -> bool:
    """Whether this user approved of the hash of a part or of its target; EVERYTHING: of any."""
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


def foreign(spec: Any) -> list[Mapping[str, Any]]:
    """The outermost parts that are not on the list of ``PARTS``."""
    if isinstance(spec, Mapping) and "_target_" in spec and not PARTS.fullmatch(str(spec["_target_"])):
        return [spec]
    return [part for value in _below(spec) for part in foreign(value)]


def _check_plain(spec: Any) -> None:
    parts, count = [spec], 0
    for _ in range(DEEPEST):
        for part in parts:
            if part is not None and not isinstance(part, str | int | float | Mapping | list | tuple):
                raise UsageError(f"the configuration holds a {type(part).__name__}, which is not a plain value")
            if isinstance(part, int | float) and not abs(part) < 2**63:  # NaN neither
                raise UsageError("the configuration holds a number that is too large or not finite")
        parts = [value for part in parts for value in _below(part)]
        if not parts or (count := count + len(parts)) > MOST:
            break
    if parts:
        raise UsageError(f"the configuration {TOO_MANY}")
    _check_texts(spec)


def _check_texts(spec: Any) -> None:
    for text in everything_in(spec):
        if isinstance(text, str) and "${" in text:
            raise UsageError(f"the configuration holds {text!r:.80}, which is not a plain value")


def targets(spec: Any) -> list[str]:
    """The targets of a part and of all parts below it."""
    return [str(part["_target_"]) for part in everything_in(spec) if isinstance(part, Mapping) and "_target_" in part]


def everything_in(spec: Any) -> Iterator[Any]:
    """A value, and all keys and values below it, outermost first."""
    parts = [spec]
    while parts:
        yield from parts
        parts = [value for part in parts for value in _below(part)]


def _below(spec: Any) -> list[Any]:
    if isinstance(spec, Mapping):
        return [*spec, *spec.values()]
    return list(spec) if isinstance(spec, list | tuple) else []
