"""Whether the parts that a configuration names exist and take the arguments that it states, before any is built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from kitseg.errors import InputError

STAGE_MODULE = re.compile(r"stages\.[^.]+\.module")
TRAINING = ("loss", "weights", "optimizer", "scheduler", "window")  # beside a stage's model, not its arguments


def check_arguments(configuration: Mapping[str, Any], file: Path) -> None:
    """Import every part of a configuration, and compare its arguments with those that the part takes.

    Raises:
        InputError: a part that can't be imported, or an argument that it doesn't take; names its key in ``file``.
    """
    for key, spec in _parts("", configuration):
        part = _located(key, str(spec["_target_"]), file)
        taken = _parameters(part)
        stated = [name for name in spec if not (name.startswith("_") and name.endswith("_"))]
        known = TRAINING if STAGE_MODULE.fullmatch(key) else ()
        if taken is not None and (unknown := [name for name in stated if name not in (*taken, *known)]):
            problem = f"{key}: {spec['_target_']} takes no argument {', '.join(map(repr, unknown))}"
            raise InputError(file, problem, f"It takes {', '.join(taken) or 'none'}.")


def _parts(key: str, spec: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every part with its key."""
    if isinstance(spec, Mapping):
        if "_target_" in spec:
            yield key, spec
        for name, value in spec.items():
            yield from _parts(f"{key}.{name}" if key else str(name), value)
    elif isinstance(spec, list):
        for number, value in enumerate(spec):
            yield from _parts(f"{key}[{number}]", value)


def _located(key: str, target: str, file: Path) -> Any:
    """What a target names: a class or function of a module, or an attribute of a class."""
    module, _, name = target.rpartition(".")
    try:
        found = import_module(module) if module else None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise _not_imported(key, target, file, error) from error
        owner, _, name_of_class = module.rpartition(".")
        found = getattr(_imported(key, target, owner, file, error), name_of_class, None)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise _not_imported(key, target, file, error) from error
    if not hasattr(found, name):
        similar = get_close_matches(name, dir(found), 3)
        hint = f"There is {', '.join(similar)}." if similar else "Check its name."
        raise InputError(file, f"{key}: there is no {name!r} in {module}", hint)
    return getattr(found, name)


def _imported(key: str, target: str, module: str, file: Path, first: Exception) -> Any:
    try:
        return import_module(module)
    except Exception as error:
        raise _not_imported(key, target, file, first) from error


def _not_imported(key: str, target: str, file: Path, error: Exception) -> InputError:
    problem = f"{key}: {target} can't be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    return InputError(file, problem, "Install its package, or put its Python file beside this one.")


def _parameters(part: Any) -> list[str] | None:
    """The names of the arguments that a part takes; None where it takes any, or doesn't show them."""
    try:
        parameters = inspect.signature(part).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
