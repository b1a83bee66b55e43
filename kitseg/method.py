"""A method as a typed graph: stages with named inputs, the channels it puts out, and its post-processing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta, ValidationError, convert

from kitseg import trust
from kitseg.errors import UsageError
from kitseg.labels import Scheme, scheme_of
from kitseg.parts import check_stage, check_steps
from kitseg.types import EARLIER_TUMOR, Grid

PARTS = ("intensity", "region", "sampler", "module", "link", "augmentation")
# Keys of a stage that may be null.
OPTIONAL = ("inputs", "guide", "link", "augmentation", "micro_batch_size", "nested_epochs", "stop_after", "rounds")
MOST_STAGES = 8
#: Lightning's short names of precisions, and the full ones.
_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
Count = Annotated[int, Meta(ge=1)]


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

    most: Annotated[int, Meta(ge=0)]
    share: Annotated[float, Meta(gt=0, le=1)]
    epochs: Count


@dataclass(frozen=True)
class StageSpec:
    """One stage of a method.

    inputs: the earlier stage that this one builds on, if any; guide: what it is trained with of that one's output, the
    true ``labels`` or ``out_of_fold`` predictions; grid: the lattice it works on; heads, channels: what it predicts;
    batch: patches a step, over all ranks; micro_batch_size: patches a rank computes at a time, whose gradients
    accumulate to the batch; nested_epochs: of the trainings on nested folds, at most ``epochs``; stop_after:
    validations without improvement that end the training; rounds: trainings after the first; parts: the specifications
    for ``kitseg.config.build``.
    """

    name: str
    inputs: tuple[str, ...]
    guide: Literal["labels", "out_of_fold"]
    grid: Grid
    heads: tuple[str, ...]
    channels: tuple[str, ...]
    batch: Count
    micro_batch_size: Count
    epochs: Count
    nested_epochs: Count | None
    validate_every: Count
    stop_after: Count | None
    rounds: Rounds | None
    precision: str
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A method as a small graph: stages with named inputs, the channels it puts out, what cleans them, the labels."""

    name: str
    paper: str
    stages: Mapping[str, StageSpec]
    outputs: Mapping[str, Source]
    postprocess: Mapping[str, Any]
    labels: Scheme

    @property
    def finds_cysts(self) -> bool:
        """Whether cysts are a class of its output."""
        return "cyst" in self.outputs


def method_of(config: Mapping[str, Any]) -> Method:
    """The method that a resolved configuration describes.

    Raises:
        UsageError: a key is missing or has a value that can't be used.
    """
    try:
        for key in ("chain", "outputs"):
            if not (isinstance(config[key], str) or 1 <= len(config[key]) <= MOST_STAGES):
                raise ValueError(f"{key} has no entries or more than {MOST_STAGES}")
        check_steps(config["postprocess"])
        stages = {trust.name(name): _stage(name, config["stages"][name]) for name in config["chain"]}
        for stage in stages.values():
            _check_guide(stage, stages)
        outputs = _outputs(config["outputs"], stages)
        labels = scheme_of(config["labels"])
        return Method(trust.name(config["name"]), config["paper"], stages, outputs, config["postprocess"], labels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"the configuration does not describe a method ({reason})") from error


def needed(stages: Mapping[str, StageSpec], name: str) -> list[str]:
    """A stage and those that it builds on, directly or not, in order."""
    found = {name}
    for stage in reversed(list(stages)):
        if stage in found:
            found |= set(stages[stage].inputs)
    return [stage for stage in stages if stage in found]


def parse_source(text: str, stages: Mapping[str, StageSpec]) -> Source:
    """``stage[.head].channel`` as a source. Raises UsageError: an unknown stage, head or channel."""
    stage, *rest = text.split(".")
    spec = _known(stages, stage, "stage")
    if len(rest) not in (1, 2):
        raise UsageError(f"{text} is not of the form stage[.head].channel")
    head, channel = rest if len(rest) == 2 else (spec.heads[-1], *rest)
    _known(spec.heads, head, f"head of {stage}")
    _known(spec.channels, channel, f"channel of {stage}")
    return Source(stage, head, channel)


def stage_outputs(text: str, stages: Mapping[str, StageSpec]) -> dict[str, Source]:
    """All channels of ``stage[.head]``; a stage alone means its last head.

    Raises:
        UsageError: an unknown stage or head.
    """
    stage, _, head = text.partition(".")
    spec = _known(stages, stage, "stage")
    _known(spec.heads, head or spec.heads[-1], f"head of {stage}")
    return {channel: Source(stage, head or spec.heads[-1], channel) for channel in spec.channels}


def _outputs(stated: Any, stages: Mapping[str, StageSpec]) -> dict[str, Source]:
    """The sources of a method's channels, by name; ``stage[.head]`` alone means all of its channels.

    ``earlier_tumor`` makes no labels and comes last. Raises ValueError: it is not an earlier stage's tumor.
    """
    if isinstance(stated, str):
        return stage_outputs(stated, stages)
    found = {trust.name(channel): parse_source(text, stages) for channel, text in stated.items()}
    if EARLIER_TUMOR in found:
        earlier, last = found[EARLIER_TUMOR], found["tumor"].stage
        if earlier.channel != "tumor" or earlier.stage not in needed(stages, last)[:-1]:
            raise ValueError(f"outputs.{EARLIER_TUMOR} must be the channel tumor of a stage before {last}")
    return dict(sorted(found.items(), key=lambda item: item[0] == EARLIER_TUMOR))


class _Blocks(TypedDict):
    module: dict[str, Any]
    augmentation: list[dict[str, Any]] | None


def _stage(name: str, stated: Mapping[str, Any]) -> StageSpec:
    config = {**dict.fromkeys(OPTIONAL), **stated, "name": name}
    if missing := [key for key in ("batch", "grid", "heads", "channels", "precision", *PARTS) if key not in config]:
        raise UsageError(f"stages.{name} lacks {', '.join(missing)}")
    filled = {
        "batch": config["batch"],  # checked before what it fills in
        **config,
        "inputs": config["inputs"] or (),
        "guide": config["guide"] or "labels",
        "micro_batch_size": config["batch"] if config["micro_batch_size"] is None else config["micro_batch_size"],
        "precision": _PRECISIONS.get(str(config["precision"]), config["precision"]),
        "heads": tuple(map(trust.name, config["heads"])),
        "channels": tuple(map(trust.name, config["channels"])),
        "parts": {key: config[key] for key in PARTS},
    }
    for key, kind in {"grid": Grid, "rounds": Rounds}.items():
        if isinstance(config[key], Mapping) and (odd := config[key].keys() - {field.name for field in fields(kind)}):
            raise UsageError(f"stages.{name}.{key} has no key {', '.join(map(str, odd))}")
    try:
        convert(filled["parts"], _Blocks)
        check_stage(config)
        return convert(filled, StageSpec)
    except UsageError as error:
        raise UsageError(f"stages.{name}: {error}") from error
    except ValidationError as error:
        problem, _, key = str(error).partition(" - at `$")
        raise UsageError(f"stages.{name}{key.rstrip('`')}: {problem}") from error


def _check_guide(stage: StageSpec, stages: Mapping[str, StageSpec]) -> None:
    before = [*stages][: [*stages].index(stage.name)]
    if odd := [name for name in stage.inputs if name not in before]:
        raise UsageError(f"stages.{stage.name}.inputs names {odd[0]}, which is not before it in chain")
    if stage.parts["link"] and not stage.inputs:
        raise UsageError(f"stages.{stage.name}.link needs an earlier stage in stages.{stage.name}.inputs")
    if stage.parts["link"] and str(stage.grid) != str(stages[stage.inputs[0]].grid):
        raise UsageError(f"stage {stage.name} is guided by {stage.inputs[0]}, so both need the same grid")


def _known(known: Any, name: str, kind: str) -> Any:
    if name not in known:
        raise UsageError(f"there is no {kind} '{name}'; there are {', '.join(known)}")
    return known[name] if isinstance(known, Mapping) else name
