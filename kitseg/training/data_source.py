"""Where a run's training patches come from: the ``data`` block of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, ValidationError, convert

from kitseg import config
from kitseg.config import Config, Method, StageSpec
from kitseg.errors import UsageError
from kitseg.patches.samplers import ForegroundSampler
from kitseg.patches.synthetic import parts_without

#: The ``data`` block of a configuration; runs of kitseg 0.1 have none.
DEFAULT: Mapping[str, Any] = {"source": "cases", "lesions": None, "patients": 250, "validation": 2, "without": []}
SMALLEST = 8  # voxels of a patch along each axis
_OTHERWISE = "Write cases with `kitseg synthesize` and train on these instead"
Count = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class DataSettings:
    """The ``data`` block of a configuration.

    source: what training patches show, the cases themselves or synthetic patients made from them; lesions: folder of
    label maps that give shapes, None for drawn ones; patients: per epoch; validation: patients per validation body;
    without: parts of the synthesis that are switched off.
    """

    source: Literal["cases", "synthesis"]
    lesions: str | None
    patients: Count
    validation: Count
    without: tuple[str, ...]


def data_settings(configuration: Config) -> DataSettings | None:
    """How patients are made; None if a run learns from the cases themselves. Raises UsageError: an invalid value."""
    try:
        found = convert({**DEFAULT, **(configuration.get("data") or {})}, DataSettings)
    except ValidationError as error:
        raise UsageError(f"data: {error}") from error
    parts_without(found.without)
    return found if found.source == "synthesis" else None


def check_method(method: Method) -> None:
    """Raises UsageError: a stage can't learn from synthetic patients."""
    for stage in method.stages.values():
        link, grid = stage.parts["link"], stage.grid
        if stage.rounds or link or stage.guide == "out_of_fold":
            problem = "it learns in rounds, or from the output of another stage"
        elif grid.slices is None or grid.inplane is None:
            problem = "its grid has no fixed spacing in mm"
        elif not _takes_patches(stage):
            problem = f"it doesn't learn from 3D patches of a fixed size ({SMALLEST} voxels or more)"
        else:
            continue
        raise UsageError(f"data.source=synthesis: not for {method.name}, stage {stage.name}: {problem}. {_OTHERWISE}")


def _takes_patches(stage: StageSpec) -> bool:
    sampler = config.build(stage.parts["sampler"])
    return isinstance(sampler, ForegroundSampler) and min(sampler.patch_size) >= SMALLEST
