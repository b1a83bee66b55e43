"""Preprocessed cases as TorchIO subjects that read no more than a patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchio as tio

from kitseg.types import Box
from kitseg.volumes.store import StoredCase, open_case


class CaseSubjects(tio.SubjectsDataset):
    """Subjects of stored cases, opened when asked for, their voxels left on disk.

    Args:
        folders: one stored case each.
        regions: the box of the case's grid that its stage works in, by case.
    """

    def __init__(self, folders: Sequence[Path], regions: Sequence[Box]) -> None:
        self.folders, self.regions = list(folders), list(regions)
        super().__init__(self.folders, load_getitem=False)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tio.Subject:
        """The subject with ``image`` (HU), ``label``, ``foreground`` coordinates and ``region``."""
        return subject_of(open_case(self.folders[index]), self.regions[index])

    @staticmethod
    def _parse_subjects_list(subjects_list: Any) -> None:
        """Folders stand for subjects here, which ``__getitem__`` opens."""


def subject_of(case: StoredCase, region: Box) -> tio.Subject:
    """A TorchIO subject over the memory-mapped arrays of ``case``."""
    if case.label is None:
        raise ValueError(f"{case.id} has no label to learn from")
    # TorchIO's own reader copies whole volumes; a tensor over the mapping reads the pages of a patch only.
    return tio.Subject(
        image=tio.ScalarImage(tensor=torch.from_numpy(case.image)[None], affine=case.grid.affine),
        label=tio.LabelMap(tensor=torch.from_numpy(case.label)[None], affine=case.grid.affine),
        foreground=torch.from_numpy(case.foreground),
        region=torch.tensor([*region.start, *region.stop]),
        case=case.id,
    )


def region_of(subject: tio.Subject) -> Box:
    """The region of a subject as a box."""
    values = np.asarray(subject["region"]).tolist()
    z0, y0, x0, z1, y1, x1 = values
    return Box((z0, y0, x0), (z1, y1, x1))
