"""Whether the parts that a configuration names exist and take the arguments that it states, before any is built."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

from kitseg.errors import InputError

STAGE_MODULE = re.compile(r"stages\.[^.]+\.module")
TRAINING = ("loss", "weights", "optimizer", "scheduler", "window")  # beside a stage's model, not its arguments


def check_arguments(spec: Any, file: Path, key: str = "") -> None:
    """Import every part of a configuration, and compare its arguments with those that the part takes.

    Raises:
        InputError: a part that can't be imported, or an argument that it doesn't take; names its key in ``file``.
    """
    if isinstance(spec, list):
        spec = {f"[{number}]": value for number, value in enumerate(spec)}
    if not isinstance(spec, dict):
        return
    for name, value in spec.items():
        check_arguments(value, file, f"{key}.{name}".lstrip(".").replace(".[", "["))
    if "_target_" not in spec:
        return
    known = TRAINING if STAGE_MODULE.fullmatch(key) else ()
    stated = {name: value for name, value in spec.items() if not name.startswith("_") and name not in known}
    try:
        part: Any = locate(str(spec["_target_"]))
        if part is None:
            raise ImportError("it was not found; install its package, or put its Python file beside this file")
        _bind(part, stated)
    except Exception as error:  # whatever a user's module raises when it is imported
        problem = f"{key}: {spec['_target_']}: {' '.join(str(error).split())}"
        raise InputError(file, problem, "Check its name and its arguments.") from error


def _bind(part: Any, arguments: dict[str, Any]) -> None:
    try:
        takes = signature(part)
    except ValueError:  # a class written in C shows no signature
        return
    takes.bind_partial(**arguments)
