"""Properties of a labelled case, from its files alone, that a split balances."""

from __future__ import annotations

from kitseg.labels import TUMOR, Scheme
from kitseg.types import Case, Traits
from kitseg.volumes.nifti import canonical_geometry, read_geometry, read_image, read_labels
from kitseg.volumes.scan import check_grid, label_of


def read_traits(case: Case, scheme: Scheme) -> Traits:
    """A labelled case's tumor volume and slice distance, from its label map.

    Raises:
        InputError: no label, or one that can't be read.
    """
    label = read_labels(label_of(case), case.id, scheme)
    tumor_ml = int((label.array == TUMOR).sum()) * label.geometry.voxel_ml
    patient = case.patients[0] if case.patients else case.id
    return Traits(case.id, patient, tumor_ml, label.geometry.spacing[0])


def read_whole(case: Case, scheme: Scheme) -> Traits:
    """The same, after a check of the CT: it is read, and an InputError is raised unless it lies on the labels' grid."""
    geometry = read_image(case.image, case.id).geometry
    traits = read_traits(case, scheme)
    check_grid(label_of(case), canonical_geometry(read_geometry(label_of(case))), geometry)
    return traits
