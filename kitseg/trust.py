"""What a configuration from anybody may hold: plain values, and names of parts that kitseg builds from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import yaml

from kitseg.errors import UsageError

PARTS = re.compile(
    r"kitseg\.((nets|losses|links|stages|postprocess)\.[a-z]\w*|patches\.samplers|inference\.windows)\.[A-Z]\w*"
    r"|torch\.(nn|optim|optim\.lr_scheduler)\.[A-Z]\w*"
    r"|torchio\.Random[A-Z]\w*",
    re.ASCII,
)


def parse(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: no YAML, or with tags or aliases, by which a small text can become objects or a huge value.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it holds an alias")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump(content: Any) -> str:
    """Plain values as YAML that ``parse`` reads: what is in it twice is written twice."""
    text: str = yaml.dump(content, Dumper=_Plain, sort_keys=False, allow_unicode=True)
    return text


class _Plain(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    def ignore_aliases(self, data: Any) -> bool:
        return True


def check_plain(spec: Any) -> None:
    """Make sure that no text asks for an interpolation and that each ``_target_`` is one that kitseg builds from.

    Raises:
        UsageError: one of them isn't.
    """
    for text in _texts(spec):
        if "${" in text:
            raise UsageError(f"the configuration holds {text!r}, which is not a plain value")
    for target in _targets(spec):
        if not PARTS.fullmatch(target):
            raise _no_part(target)


def check_parts(spec: Any) -> None:
    """``check_plain``, and each ``_target_`` is a class that is at home in the module it is asked from.

    Raises:
        UsageError: one of them isn't: a function, something that the module merely imports, or nothing at all.
    """
    check_plain(spec)
    for target in _targets(spec):
        module, _, name = target.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"the configuration names {target!r}, which isn't there") from error
        if not isinstance(found, type) or not f"{found.__module__}.".startswith(f"{module}."):
            raise _no_part(target)


def name(text: Any) -> str:
    """A name that may become part of a path or of a line on the screen.

    Raises:
        UsageError: other characters, or too many.
    """
    if not isinstance(text, str) or not re.fullmatch(r"\w[\w-]{0,63}", text, re.ASCII):
        raise UsageError(f"{text!r} is no name: it takes letters, digits, - and _")
    return text


def is_line(text: Any) -> bool:
    """Whether this is a text for a line on the screen."""
    return isinstance(text, str) and 0 < len(text) <= 200 and text.isprintable()


def _no_part(target: str) -> UsageError:
    return UsageError(f"the configuration names {target!r}, which is not a part that kitseg builds from")


def _texts(spec: Any) -> Iterator[str]:
    for part in _below(spec):
        yield from _texts(part)
    if isinstance(spec, str):
        yield spec


def _targets(spec: Any) -> Iterator[str]:
    if isinstance(spec, Mapping) and "_target_" in spec:
        yield str(spec["_target_"])
    for part in _below(spec):
        yield from _targets(part)


def _below(spec: Any) -> list[Any]:
    if isinstance(spec, Mapping):
        return [part for pair in spec.items() for part in pair]
    return list(spec) if isinstance(spec, list | tuple) else []
