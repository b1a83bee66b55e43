"""What is known of a labelled case before any network has seen it."""

from __future__ import annotations

from kitseg.errors import InputError
from kitseg.labels import TUMOR, to_kits19
from kitseg.types import Case, Traits
from kitseg.volumes.nifti import read_labels


def read_traits(case: Case, convention: str) -> Traits:
    """A labelled case's tumor volume and slice distance, from its label map.

    Raises:
        InputError: no label, or one that can't be read.
    """
    if case.label is None:
        raise InputError(case.image, "has no segmentation beside it", "Add segmentation.nii.gz.")
    label = read_labels(case.label, case.id, convention)
    tumor_ml = int((to_kits19(label.array) == TUMOR).sum()) * label.geometry.voxel_ml
    patient = case.patients[0] if case.patients else case.id
    return Traits(case.id, patient, tumor_ml, label.geometry.spacing[0])
