"""A run as data: composing it, reading it back, and building objects from it. The only module that knows Hydra.

``kitseg.yaml``, a method's file and the files that it names are composed in two steps: the first shows the method's
``sizes`` and stages, the second adds the chosen size and what the user changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kitseg import trust
from kitseg.errors import InputError, UsageError
from kitseg.labels import Scheme, built_in_names, find_scheme, scheme_of
from kitseg.method import OPTIONAL, Method, Source, StageSpec, method_of
from kitseg.method_files import BUILT_IN, MethodFile, find_method, method_files
from kitseg.parts import check_arguments
from kitseg.plain_files import read_yaml

__all__ = [
    "Config", "Method", "Source", "StageSpec", "build", "compose", "differences", "method_of", "read", "sizes",
    "stated_scheme", "summaries",
]  # fmt: skip

Config = dict[str, Any]
EACH_STAGE = "stages.*."
LABELS = ("labels=", "convention=")
CHOSEN = "kitseg_chosen"  # the name that Hydra knows the chosen method and size by
RENAMED = {"at_once": "micro_batch_size", "inner_folds": "nested_folds"}
TARGETS = {  # classes that were dropped, whose parts the general ones take
    "kitseg.stages.attention_unet.ProgressiveAttentionUNet": "kitseg.stages.model.SliceModel",
    "kitseg.stages.foreground_net.ForegroundStage": "kitseg.stages.model.StageModel",
    "kitseg.stages.fused_vnet.FusedVNet": "kitseg.stages.model.StageModel",
    "kitseg.stages.slice_unet.SliceUNet": "kitseg.stages.model.SliceModel",
}
CLIP_SCALE = "kitseg.links.intensity.ClipScale"
COPIES = {"_target_": "kitseg.patches.lesion_copies.LesionCopies", "p": 0}
ADDED = {"kitseg.losses.tversky.FocalTversky": {"count_absent": True}}  # options of classes, as before there were these

OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)
OmegaConf.register_new_resolver("div", lambda a, b: a / b, replace=True)
OmegaConf.register_new_resolver("len", len, replace=True)
OmegaConf.register_new_resolver(
    "classes", lambda *, _root_: ["background", *scheme_of(OmegaConf.to_container(_root_.labels)).ids], replace=True
)
OmegaConf.register_new_resolver("channels_of", lambda intensity: 1 + len(intensity.get("windows") or ()), replace=True)
OmegaConf.register_new_resolver("share", lambda whole, by: max(1, round(whole / by)), replace=True)
OmegaConf.register_new_resolver("sixteens", lambda voxels, by: math.ceil(voxels / by / 16) * 16, replace=True)


def compose(
    method: str, size: str, overrides: Sequence[str] = (), config_dir: Path | None = None, plan: Config | None = None
) -> Config:
    """The resolved configuration of a run; its parts may be built from now on, wherever they come from.

    Args:
        method: a method's name, or the path of its YAML file.
        size: one of the blocks in its ``sizes``; the method's files refer to it as ``size``.
        overrides: ``KEY=VALUE``; ``stages.*.KEY=VALUE`` is for each stage, before those of one stage, and
            ``labels=SCHEME`` takes what ``labels.find_scheme`` does.
        config_dir: a folder laid out like ``conf``; what it holds takes the place of kitseg's of the same name.
        plan: values in place of the size's block.

    Raises:
        UsageError: an unknown method, size or key, or a value of the wrong form. InputError: an unusable method file.
    """
    file = find_method(method, config_dir)
    described = _described(file)
    known = _sizes(described)
    if size not in known:
        raise UsageError(f"{file.name} has no size '{size}'. Choose from {', '.join(known)}")
    for override in overrides:
        if not re.match(r"(?!hydra\.|method=|size=)[A-Za-z]\S*=", override):
            raise UsageError(f"--set {override}: write KEY=VALUE, such as stages.*.epochs=50")
    ConfigStore.instance().store(CHOSEN, stated_scheme(overrides).plain(), "labels")
    overrides = [override for override in overrides if not override.startswith(LABELS)]
    ConfigStore.instance().store(CHOSEN, {"name": size, **((plan if plan is not None else known[size]) or {})}, "size")
    changes = [f"labels={CHOSEN}", f"+size={CHOSEN}", *(["~sizes"] if "sizes" in described else [])]
    for name, stage in described["stages"].items():
        changes += [f"+stages.{name}.{key}=null" for key in OPTIONAL if key not in stage]
    general = [override for override in overrides if override.startswith(EACH_STAGE)]
    changes += [f"stages.{name}.{o.removeprefix(EACH_STAGE)}" for o in general for name in described["stages"]]
    changes += [override for override in overrides if override not in general]
    try:
        plain = OmegaConf.to_container(_hydra(file, changes), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra's own checks raise any of them
        if not overrides:
            raise _unusable(file, error) from error
        raise _explained(compose(method, size, (), config_dir, plan), overrides, str(error)) from error
    configuration = {str(key): _used(value) for key, value in plain.items()} if isinstance(plain, dict) else {}
    for key, least in {"seed": 0, "folds": 2, "nested_folds": 2, "test_cases": 0, "keep_best": 1}.items():
        value = configuration[key]
        if not isinstance(value, int) or not least <= value < 2**32:
            raise UsageError(f"{key} is {value!r}; it must be a whole number from {least} to {2**32 - 1}")
    trust.approve(configuration)
    if file.own:
        _check_own(file, configuration)
    return configuration


def stated_scheme(overrides: Sequence[str]) -> Scheme:
    """The label scheme that overrides state last; kits19 where they state none. Raises: see ``labels.find_scheme``."""
    named = [override.partition("=")[2] for override in overrides if override.startswith(LABELS)]
    return find_scheme(named[-1] if named else "kits19")


def sizes(method: str, config_dir: Path | None = None) -> Config:
    """The blocks of a method's sizes by their names. Raises: see ``compose``."""
    return _sizes(_described(find_method(method, config_dir)))


def summaries(config_dir: Path | None = None) -> dict[MethodFile, Config]:
    """What each method's file states in plain values: ``chain``, ``paper`` and ``published``.

    Raises:
        InputError: an unusable method file.
    """
    return {file: _described(file) for file in method_files(config_dir)}


def read(path: Path) -> Config:
    """A resolved configuration that ``trust.dump`` made; it may come from anybody, and nothing in it is executed.

    Raises:
        InputError: missing, damaged, with values that aren't plain, or with parts that kitseg must not build.
    """
    try:
        config = read_yaml(path)
    except (OSError, ValueError) as error:
        raise InputError(path, f"can't be read ({error})", "Train again, or restore the file.") from error
    if not isinstance(config, dict):
        raise InputError(path, "is not a configuration", "Train again, or restore the file.")
    trust.check_file(path, config)
    current: Config = _with_current_names(config)
    if "labels" not in current:
        name = current.pop("convention", "kits19")
        current["labels"] = scheme_of(name).plain() if name in built_in_names() else name
    return current


def differences(old: Config, new: Config) -> list[str]:
    """One line for each key whose value differs; ``size`` is left out, since its values are in the stages, too."""
    return list(_differences({**old, "size": None}, {**new, "size": None}, ""))


def build(spec: Any, **more: Any) -> Any:
    """The object that ``_target_`` names, with everything below it.

    Raises:
        UsageError: a target that must not be built, or arguments that it doesn't take.
    """
    trust.check_before_build(spec)
    try:
        return instantiate(spec, **more, _convert_="all")
    except HydraException as error:
        raise UsageError(" ".join(str(error).split())) from error


def _sizes(described: Config) -> Config:
    found: Config = described.get("sizes") or {"paper": {}}
    return found


def _described(file: MethodFile) -> Config:
    """A method's files composed without a size, interpolations as they stand."""
    try:
        read_yaml(file.path, aliases=True)
        content = OmegaConf.load(file.path)
        if not OmegaConf.is_dict(content):
            raise ValueError("it must be a mapping")
        ConfigStore.instance().store(CHOSEN, content, "method", "_global_")
        described: Any = OmegaConf.to_container(_hydra(file, []), resolve=False)
    except (OSError, yaml.YAMLError, HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise _unusable(file, error) from error
    stages = described.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise _unusable(file, "it has no stages")
    return {str(key): value for key, value in described.items()}


def _hydra(file: MethodFile, changes: Sequence[str]) -> Any:
    """The composed configuration; a file in an earlier folder takes the place of the same in a later one."""
    first, *others = file.folders
    quoted = ("'file://" + re.sub(r"(['\\\\])", r"\\\1", str(folder)) + "'" for folder in others)
    ConfigStore.instance().store(CHOSEN, OmegaConf.load(BUILT_IN / "kitseg.yaml"))
    with initialize_config_dir(str(first), version_base="1.3"):
        return hydra_compose(CHOSEN, [f"hydra.searchpath=[{','.join(quoted)}]", f"method={CHOSEN}", *changes])


def _check_own(file: MethodFile, configuration: Config) -> None:
    """Import the parts of a user's own method, and make sure that it describes one."""
    for folder in file.own:
        trust.import_from(folder)
    check_arguments(configuration, file.path)
    try:
        method_of(configuration)
    except UsageError as error:
        raise _unusable(file, error) from error


def _unusable(file: MethodFile, reason: object) -> InputError:
    text = " ".join(str(reason).replace(f"method/{CHOSEN}", file.path.name).split())
    return InputError(file.path, f"can't be used as a method ({text})", "See docs/methods.")


def _explained(composed: Config, overrides: Sequence[str], message: str) -> UsageError:
    """Hydra's message in a line; where a key isn't there, with the keys that are."""
    for key in (override.partition("=")[0] for override in overrides):
        there: Any = composed
        for part in key.split("."):
            if isinstance(there, dict) and part != "*" and part not in there:
                return UsageError(f"--set {key}: unknown key. Choose from {', '.join(there)}")
            there = there.get(part, next(iter(there.values()), None)) if isinstance(there, dict) else None
    return UsageError(f"--set {' '.join(overrides)}: {' '.join(message.split())}")


def _differences(old: Config, new: Config, prefix: str) -> Iterator[str]:
    for key in sorted({*old, *new}):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{name}.")
        elif before != after:
            yield f"{name}: {before} → {after}"


def _used(value: Any) -> Any:
    """A configuration, or a part of it, without copies of lesions of probability 0 and without empty windows of HU.

    Older runs don't have them.
    """
    if isinstance(value, dict):
        scale = value.get("_target_") == CLIP_SCALE
        return {key: _used(item) for key, item in value.items() if not (scale and (key, item) == ("windows", []))}
    return [_used(item) for item in value if item != COPIES] if isinstance(value, list) else value


def _with_current_names(value: Any) -> Any:
    """A configuration, or a part of it, of an older kitseg with today's names, and with what became an option since."""
    if isinstance(value, list):
        return [_with_current_names(item) for item in value]
    if not isinstance(value, dict):
        return TARGETS.get(value, value) if isinstance(value, str) else value
    renamed: dict[Any, Any] = {RENAMED.get(key, key): _with_current_names(item) for key, item in value.items()}
    renamed = {**ADDED.get(renamed.get("_target_", ""), {}), **renamed}
    return {**renamed, "guide": "out_of_fold"} if renamed.get("guide") == "inner" else renamed
