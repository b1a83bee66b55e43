"""Preprocessed cases as TorchIO subjects that read only the pages of a patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchio as tio
from numpy.typing import NDArray

from kitseg.errors import KitsegError
from kitseg.links.input_transform import InputTransform
from kitseg.types import Box, triple
from kitseg.volumes.store import StoredCase, open_case, open_guide


@dataclass(frozen=True)
class StageInput:
    """The region of a case that a stage processes, and the file of its guide (see ``links.guides``).

    ``box`` is None if the earlier stage found nothing. made_from: of the case when the region was found, see
    ``StoredCase``; empty where that isn't known.
    """

    box: Box | None
    guide: Path | None = None
    made_from: str = ""

    def read_guide(self) -> NDArray[np.float16] | None:
        """The guide (G, D, H, W) on the whole grid, memory-mapped."""
        return None if self.guide is None else open_guide(self.guide)

    def check(self, case: StoredCase) -> StoredCase:
        """The case. Raises KitsegError: it was stored again since, from another scan or label map."""
        if self.made_from in ("", case.made_from):
            return case
        raise KitsegError(
            f"{case.id} was preprocessed again from another scan or label map while a training used it. Give each data "
            "set its own --store, or begin the training again with --restart"
        )


class CaseSubjects(tio.SubjectsDataset):
    """Subjects of stored cases, opened on access and memory-mapped.

    Args:
        places: the stage's input of each case, by the case's folder; each has a box.
    """

    def __init__(self, places: Mapping[Path, StageInput]) -> None:
        self.folders, self.places = list(places), list(places.values())
        super().__init__(self.folders, load_getitem=False)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tio.Subject:
        """The subject; see ``subject_of``."""
        folder = self.folders[index]
        case, place = _opened(folder, (folder / "meta.json").stat().st_mtime_ns), self.places[index]
        return subject_of(place.check(case), place)

    @staticmethod
    def _parse_subjects_list(subjects_list: Any) -> None:
        """Keep the folders, which ``__getitem__`` opens as subjects."""


def subject_of(case: StoredCase, place: StageInput) -> tio.Subject:
    """A TorchIO subject over the memory-mapped arrays of ``case``.

    It has ``image`` (HU), ``label``, optionally ``guide``, and the case's ``foreground``, ``slices``, ``statistics``
    and ``region``.
    """
    if case.label is None or place.box is None:
        raise ValueError(f"{case.id} has no label or no region to train on")
    # TorchIO's own reader copies whole volumes; a tensor over the mapping reads the pages of a patch only.
    images: dict[str, tio.Image] = {
        "image": tio.ScalarImage(tensor=torch.from_numpy(case.image)[None], affine=case.grid.affine),
        "label": tio.LabelMap(tensor=torch.from_numpy(case.label)[None], affine=case.grid.affine),
    }
    guide = place.read_guide()
    if guide is not None:
        images["guide"] = tio.ScalarImage(tensor=torch.from_numpy(guide), affine=case.grid.affine)
    return tio.Subject(
        **images,
        foreground=torch.from_numpy(case.foreground),
        slices=torch.from_numpy(case.slices),
        statistics=torch.tensor(case.statistics, dtype=torch.float64),
        region=torch.tensor([*place.box.start, *place.box.stop]),
        case=case.id,
    )


def transform_patch(patch: tio.Subject, transform: InputTransform) -> tio.Subject:
    """A patch whose image is the network's input."""
    image, (mean, deviation) = patch.get_image("image"), torch.as_tensor(patch["statistics"]).tolist()
    guide = patch.get_image("guide").data if "guide" in patch else None
    image.set_data(transform(image.data, (mean, deviation), guide))
    return patch


@lru_cache(maxsize=128)  # a mapped array keeps a file open, and processes may have no more than 1024
def _opened(folder: Path, written: int) -> StoredCase:
    """A stored case as it was ``written``: to open one takes longer than to read a small patch."""
    return open_case(folder)


def region_of(subject: tio.Subject) -> Box:
    """The region of a subject as a box."""
    values = torch.as_tensor(subject["region"])
    return Box(triple(values[:3]), triple(values[3:]))
