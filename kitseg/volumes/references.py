"""Label maps that others made, read by a scheme that was stated, or is the usual one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitseg.labels import Scheme, check_data_set
from kitseg.types import Geometry, Triple, Volume
from kitseg.volumes.names import is_volume_name
from kitseg.volumes.nifti import read_labels


def read_reference(path: Path, case_id: str, scheme: Scheme) -> Volume:
    """A label map of a scheme that was stated, or is the usual one: see ``nifti.read_labels``.

    Raises:
        InputError: it can't be used, or nnU-Net's ``dataset.json`` of its data set contradicts the scheme.
    """
    if is_volume_name(path):
        check_data_set(path, scheme)
    return read_labels(path, case_id, scheme)


@dataclass(frozen=True)
class Shown:
    """What a label map shows, whatever its file: ``labels_digest``, and its grid (shape, affine) as plain values."""

    sha256: str
    shape: Triple
    affine: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, labels: Volume) -> Shown:
        """Of a label map in orientation (I, P, L)."""
        rows = tuple(map(tuple, labels.geometry.affine.tolist()))
        return cls(labels_digest(labels), labels.geometry.shape, rows)

    def is_of(self, labels: Volume, tolerance: float) -> bool:
        """Whether a label map shows the same, on a grid whose affine differs by at most ``tolerance`` mm."""
        grid = Geometry(self.shape, np.array(self.affine))
        return labels_digest(labels) == self.sha256 and labels.geometry.same_as(grid, tolerance)


def labels_digest(labels: Volume) -> str:
    """The sha256 of a label map's voxels with kitseg's ids, in hex: the same whatever the format of its file."""
    return hashlib.sha256(labels.array.tobytes()).hexdigest()
