"""What is known of a labelled case before any network has seen it."""

from __future__ import annotations

from kitseg.errors import InputError
from kitseg.labels import TUMOR
from kitseg.types import Case, Traits
from kitseg.volumes.store import CaseFiles


def read_traits(case: Case, convention: str) -> Traits:
    """A labelled case's tumor volume and slice distance; both files are read, so that it can be learned from.

    Raises:
        InputError: no label, a file that can't be read, or a label on another lattice than its image.
    """
    files = CaseFiles(case, convention)
    if files.labels is None:
        raise InputError(case.image, "has no segmentation beside it", "Add segmentation.nii.gz.")
    geometry = files.scan.geometry
    tumor_ml = int((files.labels == TUMOR).sum()) * geometry.voxel_ml
    patient = case.patients[0] if case.patients else case.id
    return Traits(case.id, patient, tumor_ml, geometry.spacing[0])
