"""Checks of the parts that a configuration names before any is built: that they exist, fit, and are quickly built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

from kitseg import trust
from kitseg.errors import InputError, UsageError

STAGE_MODULE = re.compile(r"stages\.[^.]+\.module")
TRAINING = ("loss", "weights", "optimizer", "scheduler")  # beside a stage's model, not its arguments
PACKAGES = {"intensity": r"kitseg\.links\.intensity", "region": r"kitseg\.links\.regions", "link": r"kitseg\.links"}
LONGEST, HIGHEST = 200, 1_000_000  # of the texts and numbers that a part takes
MOST_PARTS, MOST_STEPS = 50, 32


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
    known = (*TRAINING, "window") if STAGE_MODULE.fullmatch(key) else ()
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


def check_stage(parts: Mapping[str, Any]) -> None:
    """Make sure that what a prediction builds of a stage is built quickly; see ``check_part``."""
    for key, package in PACKAGES.items():
        if parts[key] is not None or key != "link":
            check_part(parts[key], package)
    module = {key: value for key, value in parts["module"].items() if key not in TRAINING}
    check_part({"_target_": module["_target_"]}, r"kitseg\.stages")
    check_part(module.pop("window"), r"kitseg\.inference\.windows")
    check_part(module, r"kitseg\.(stages|nets)|torch\.nn", most=4)


def check_steps(steps: Any) -> None:
    """``check_part`` each step of a post-processing; one that is null is switched off.

    Raises:
        UsageError: they are not a few priors by their names.
    """
    if not isinstance(steps, Mapping) or len(steps) > MOST_STEPS:
        raise UsageError(f"postprocess is {steps!r:.80}; it must name each prior, such as kidneys: {{_target_: ...}}")
    for step in steps.values():
        if step is not None:
            check_part(step, r"kitseg\.postprocess")


def check_part(spec: Any, package: str, most: int = 1) -> None:
    """Make sure that building a part can't take long or much memory, unless the user trusts its author.

    Args:
        spec: a part that ``trust.check`` has let pass.
        package: a pattern of the packages that its target and all targets below it are from.
        most: how many parts of kitseg it may be made of.

    Raises:
        UsageError: another part, too many, or an argument that is too large.
    """
    if trust.foreign(spec) or trust.is_approved(trust.EVERYTHING):
        return
    if not isinstance(spec, Mapping) or "_target_" not in spec:
        raise UsageError(f"{spec!r:.80} is not a part, such as {{_target_: ...}}")
    targets = trust.targets(spec)
    if odd := [target for target in targets if not re.match(rf"({package})\.", target)]:
        raise UsageError(f"{odd[0]} can't be used there")
    if len(targets) > MOST_PARTS or sum(target.startswith("kitseg.") for target in targets) > most:
        raise UsageError(f"{targets[0]} is made of {len(targets)} parts, which are too many")
    for value in trust.everything_in(spec):
        number = isinstance(value, int | float)
        if (isinstance(value, str) and len(value) > LONGEST) or (number and abs(value) > HIGHEST):
            raise UsageError(f"{targets[0]}: {value!r:.40} is too large")
