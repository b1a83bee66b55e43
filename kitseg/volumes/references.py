"""Label maps that others made, read by a scheme that was stated, or is the usual one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kitseg.labels import Scheme, check_data_set
from kitseg.types import Volume
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


def labels_digest(labels: Volume) -> str:
    """The sha256 of a label map's voxels with kitseg's ids, in hex: the same whatever the format of its file."""
    return hashlib.sha256(labels.array.tobytes()).hexdigest()
