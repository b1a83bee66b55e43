"""A run as data: composing it, reading it back, and building objects from it. The only module that knows Hydra."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kitseg import trust
from kitseg.errors import InputError, UsageError
from kitseg.types import Grid

Config = dict[str, Any]
LARGEST = 1_000_000  # bytes of a configuration; kitseg's own have five thousand
RENAMED = {
    "at_once": "micro_batch_size",
    "fewer_epochs": "epoch_divisor",
    "inner_folds": "nested_folds",
    "smaller_batches": "batch_divisor",
    "thinner": "width_divisor",
}
TARGETS = {  # classes that were dropped, whose parts the general ones take
    "kitseg.stages.foreground_net.ForegroundStage": "kitseg.stages.model.StageModel",
    "kitseg.stages.fused_vnet.FusedVNet": "kitseg.stages.model.StageModel",
    "kitseg.stages.slice_unet.SliceUNet": "kitseg.stages.model.SliceModel",
}
PARTS, OPTIONAL = ("intensity", "region", "sampler", "module"), ("link", "augmentation")

OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)
OmegaConf.register_new_resolver("div", lambda a, b: a / b, replace=True)
OmegaConf.register_new_resolver("share", lambda whole, by: max(1, round(whole / by)), replace=True)
OmegaConf.register_new_resolver("sixteens", lambda voxels, by: math.ceil(voxels / by / 16) * 16, replace=True)
OmegaConf.register_new_resolver("either", lambda size, paper: paper if size is None else size, replace=True)


@dataclass(frozen=True)
class Source:
    """Where a channel comes from: a stage, one of its heads, one of that head's channels."""

    stage: str
    head: str
    channel: str


@dataclass(frozen=True)
class Rounds:
    """Trainings of a stage that each start from the best weights so far, on a new share of the cases, until none helps.

    most: rounds after the first training; share: of the training cases; epochs: of each round.
    """

    most: int
    share: float
    epochs: int

    def __post_init__(self) -> None:
        if self.most < 0 or not 0 < self.share <= 1 or self.epochs < 1:
            raise ValueError("rounds need most from 0 on, a share in (0, 1] and epochs from 1 on")


@dataclass(frozen=True)
class StageSpec:
    """One stage of a method.

    inputs: earlier stages that this one builds on; guide: what it learns with of their output, the true ``labels`` or
    ``out_of_fold`` predictions; grid: the lattice it works on; heads, channels: what it predicts; batch: patches a
    step, over all ranks; micro_batch_size: patches a rank computes at a time, whose gradients accumulate to the batch;
    stop_after: validations without improvement that end the training; rounds: trainings after the first; parts: the
    specifications for ``build``.
    """

    name: str
    inputs: tuple[str, ...]
    guide: str
    grid: Grid
    heads: tuple[str, ...]
    channels: tuple[str, ...]
    batch: int
    micro_batch_size: int
    epochs: int
    validate_every: int
    stop_after: int | None
    rounds: Rounds | None
    precision: str
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A method as a small graph: stages with named inputs, the channels it puts out, and what cleans them."""

    name: str
    paper: str
    stages: Mapping[str, StageSpec]
    outputs: Mapping[str, Source]
    postprocess: Mapping[str, Any]


def compose(method: str, size: str, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a run.

    Raises:
        UsageError: an unknown method, size or key, or a value of the wrong form.
    """
    for kind, name in (("method", method), ("size", size)):
        if name not in names(kind):
            raise UsageError(f"there is no {kind} '{name}'; there are {', '.join(names(kind))}")
    for override in overrides:
        if not re.match(r"[A-Za-z]\S*=", override):
            raise UsageError(f"--set {override}: write it as KEY=VALUE, for a key that is there")
    try:
        with initialize_config_module("kitseg.conf", version_base="1.3"):
            config = hydra_compose("kitseg", [f"method={method}", f"size={size}", *overrides])
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra's own checks raise any of them
        raise UsageError(_explain(str(error), method, size, overrides)) from error
    configuration = {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}
    for key, least in {"seed": 0, "folds": 2, "nested_folds": 2, "test_cases": 0, "keep_best": 1}.items():
        value = configuration[key]
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{key} is {value!r}; it must be a whole number from {least} on")
    return configuration


def names(kind: str) -> list[str]:
    """What there is of a kind: ``method``, ``size`` or ``stage``."""
    folder = resources.files("kitseg.conf") / kind
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def method_summary(method: str) -> Config:
    """What a method's file says in plain values, such as ``chain``, ``paper`` and ``published``; composes nothing.

    Raises:
        UsageError: the file says no such thing.
    """
    content = yaml.safe_load((resources.files("kitseg.conf") / "method" / f"{method}.yaml").read_text())
    if not isinstance(content, dict) or not {"chain", "paper", "published"} <= set(content):
        raise UsageError(f"conf/method/{method}.yaml must state chain, paper and published")
    return content


def read(path: Path) -> Config:
    """A resolved configuration that ``dump`` made; it may come from anybody, and nothing in it is executed.

    Raises:
        InputError: missing, damaged, or with values that aren't plain or parts that kitseg doesn't build from.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        config = trust.parse(path.read_text(encoding="utf-8"))
        trust.check_plain(config)
    except (OSError, ValueError, UsageError) as error:
        raise InputError(path, f"can't be read ({error})", "Train again, or restore the file.") from error
    if not isinstance(config, dict):
        raise InputError(path, "holds no configuration", "Train again, or restore the file.")
    current: Config = _with_current_names(config)
    return current


def dump(config: Config) -> str:
    """A configuration as YAML."""
    return trust.dump(config)


def differences(old: Config, new: Config, prefix: str = "") -> list[str]:
    """One line for each key whose value differs."""
    lines = []
    for key in sorted({*old, *new}):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before} → {after}")
    return lines


def method_of(config: Config) -> Method:
    """The method that a configuration describes.

    Raises:
        UsageError: a key is missing or holds what can't be meant.
    """
    try:
        stages = {trust.name(name): _stage(name, config["stages"][name]) for name in config["chain"]}
        for stage in stages.values():
            _check_guide(stage, stages)
        outputs = {trust.name(channel): parse_source(text, stages) for channel, text in config["outputs"].items()}
        return Method(trust.name(config["name"]), config["paper"], stages, outputs, config["postprocess"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the configuration describes no method ({type(error).__name__}: {error})") from error


def needed(stages: Mapping[str, StageSpec], name: str) -> list[str]:
    """A stage and those that it builds on, directly or not, in order."""
    found = {name}
    for stage in reversed(list(stages)):
        if stage in found:
            found |= set(stages[stage].inputs)
    return [stage for stage in stages if stage in found]


def parse_source(text: str, stages: Mapping[str, StageSpec]) -> Source:
    """``stage[.head].channel`` as a source.

    Raises:
        UsageError: a stage, head or channel that isn't there.
    """
    stage, *rest = text.split(".")
    spec = _known(stages, stage, "stage")
    if len(rest) not in (1, 2):
        raise UsageError(f"{text} is not of the form stage[.head].channel")
    head, channel = rest if len(rest) == 2 else (spec.heads[-1], *rest)
    _known(spec.heads, head, f"head of {stage}")
    _known(spec.channels, channel, f"channel of {stage}")
    return Source(stage, head, channel)


def head_of(text: str, stages: Mapping[str, StageSpec]) -> tuple[StageSpec, str]:
    """``stage[.head]`` as a stage and a head; a stage alone means its last head.

    Raises:
        UsageError: a stage or head that isn't there.
    """
    stage, _, head = text.partition(".")
    spec = _known(stages, stage, "stage")
    _known(spec.heads, head or spec.heads[-1], f"head of {stage}")
    return spec, head or spec.heads[-1]


def stage_outputs(text: str, stages: Mapping[str, StageSpec]) -> dict[str, Source]:
    """All channels of ``stage[.head]``; see ``head_of``."""
    spec, head = head_of(text, stages)
    return {channel: Source(spec.name, head, channel) for channel in spec.channels}


def build(spec: Any, **more: Any) -> Any:
    """The object that ``_target_`` names, with everything below it; only classes that are at home where it says.

    Raises:
        UsageError: a target that isn't allowed, or arguments that it doesn't take.
    """
    trust.check_parts(spec)
    try:
        return instantiate(spec, **more, _convert_="all")
    except HydraException as error:
        raise UsageError(" ".join(str(error).split())) from error


def _with_current_names(value: Any) -> Any:
    """A configuration, or a part of it, of kitseg 0.1 with the keys and values that have other names since."""
    if isinstance(value, list):
        return [_with_current_names(item) for item in value]
    if not isinstance(value, dict):
        return TARGETS.get(value, value) if isinstance(value, str) else value
    renamed = {RENAMED.get(key, key): _with_current_names(item) for key, item in value.items()}
    return {**renamed, "guide": "out_of_fold"} if renamed.get("guide") == "inner" else renamed


def _explain(message: str, method: str, size: str, overrides: Sequence[str]) -> str:
    """Hydra's message in a line; where a key isn't there, with the keys that are."""
    for key in (override.partition("=")[0] for override in overrides):
        if f"'{key}'" in message:
            there: Any = compose(method, size)
            known = []
            for part in key.split("."):
                known = list(there) if isinstance(there, dict) else []
                if part not in known:
                    break
                there = there[part]
            return f"--set {key}: there is no such key; there are {', '.join(known)}"
    return f"--set {' '.join(overrides)}: {' '.join(message.split())}"


def _stage(name: str, config: Config) -> StageSpec:
    try:
        grid = Grid(**config["grid"])
        rounds = Rounds(**config["rounds"]) if config.get("rounds") else None
    except (TypeError, ValueError) as error:
        raise UsageError(f"stages.{name}: {error}") from error
    return StageSpec(
        name=name,
        inputs=tuple(config["inputs"]),
        guide=config.get("guide", "labels"),
        grid=grid,
        heads=tuple(map(trust.name, config["heads"])),
        channels=tuple(map(trust.name, config["channels"])),
        batch=_count(config, name, "batch"),
        micro_batch_size=_count({"micro_batch_size": config["batch"], **config}, name, "micro_batch_size"),
        epochs=_count(config, name, "epochs"),
        validate_every=_count(config, name, "validate_every"),
        stop_after=config.get("stop_after"),
        rounds=rounds,
        precision=config["precision"],
        parts={key: config[key] for key in PARTS} | {key: config.get(key) for key in OPTIONAL},
    )


def _check_guide(stage: StageSpec, stages: Mapping[str, StageSpec]) -> None:
    if stage.guide not in ("labels", "out_of_fold"):
        raise UsageError(f"stages.{stage.name}.guide is {stage.guide!r}; it must be labels or out_of_fold")
    if stage.parts["link"] and str(stage.grid) != str(stages[stage.inputs[0]].grid):
        raise UsageError(f"stage {stage.name} is guided by {stage.inputs[0]}, so both need the same grid")


def _count(config: Config, stage: str, key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"stages.{stage}.{key} is {value!r}; it must be a whole number from 1 on")
    return value


def _known(known: Any, name: str, kind: str) -> Any:
    if name not in known:
        raise UsageError(f"there is no {kind} '{name}'; there are {', '.join(known)}")
    return known[name] if isinstance(known, Mapping) else name
