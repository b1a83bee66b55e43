"""DICOM segmentations as label maps: kitseg's own, and others' whose segments have codes of kidney and lesions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from kitseg.errors import InputError
from kitseg.labels import CLASSES, CYST, KIDNEY, TUMOR
from kitseg.types import Geometry, Volume, triple
from kitseg.volumes.dicom.headers import quiet, read_dataset, read_dicom_header, valid_uid, walk
from kitseg.volumes.dicom.series import pseudonym
from kitseg.volumes.header import MAX_VOXELS, check_affine
from kitseg.volumes.nifti import canonical_geometry, turn_to_canonical

_REMEDY = "Export the segmentation again, or convert it to NIfTI"
_UNREAD = "{} of its segments in a kidney are coded as something else than kidney, neoplasm, mass or cyst, and left out"
_LABEL_MAPS = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation Storage
_OWN_NAME = re.compile(r"series_[0-9a-f]{10}(_\d+)?")
_sct: Any = codes.SCT
#: The meaning of segments by their property type, in SNOMED CT, also by its older names (SRT), and FMA.
_TYPES = {
    KIDNEY: (_sct.Kidney, Code("9846003", "SCT", "Right kidney"), Code("18639004", "SCT", "Left kidney"),
             Code("7203", "FMA", "Kidney"), Code("7204", "FMA", "Right kidney"), Code("7205", "FMA", "Left kidney")),
    CYST: (_sct.Cyst,),
    TUMOR: (_sct.Neoplasm, _sct.NeoplasmPrimary, _sct.MalignantNeoplasmPrimary, _sct.RenalCellCarcinoma, _sct.Mass),
}  # fmt: skip


def is_segmentation(path: Path) -> bool:
    """Whether a file is a DICOM segmentation; False if it can't be read."""
    header = read_dicom_header(path)
    return header is not None and header.sop_class in (SegmentationStorage, _LABEL_MAPS)


def find_segmentations(folder: Path) -> list[Path]:
    """The DICOM segmentations below a folder."""
    return [path for path in walk(folder) if is_segmentation(path)]


def case_of_segmentation(path: Path) -> str:
    """The case of a segmentation: kitseg's name of its file, or else of the series that it refers to."""
    if _OWN_NAME.fullmatch(path.stem):
        return path.stem
    with quiet(), suppress(Exception):  # a broken file, which is reported when it is read
        return pseudonym("series", str(read_dataset(path).ReferencedSeriesSequence[0].SeriesInstanceUID))
    return pseudonym("series", path.name)


def is_of_another_series(path: Path, image: Path) -> bool:
    """Whether a segmentation states the series that it was made from, and it is not that of this image."""
    header, stated = read_dicom_header(image), set[str]()
    with quiet(), suppress(Exception):  # as above
        stated = {str(item.SeriesInstanceUID) for item in read_dataset(path).ReferencedSeriesSequence}
    if header is None or not header.series or not stated:
        return False
    with quiet():
        return stated.isdisjoint({header.series, valid_uid("series", header.series)})  # kitseg writes no invalid one


def read_segmentation(path: Path, case_id: str) -> Volume:
    """Read a DICOM segmentation as (D, H, W) uint8 in orientation (I, P, L) with kitseg's ids, on its own grid.

    Segments in a kidney that are something else are a doubt. Where segments overlap, tumor counts before cyst and cyst
    before kidney. The grid holds the slices from the first to the last with a frame.

    Raises:
        InputError: it can't be read, its frames form no volume, or no segment has such a code.
    """
    from highdicom.seg import segread  # imported here: to list files is quick without it

    try:
        with quiet():
            found = segread(path)
            meanings = {int(item.SegmentNumber): _meaning(item) for item in found.SegmentSequence}
            grid = found.get_volume_geometry()
            if grid is None or math.prod(grid.spatial_shape) > MAX_VOXELS:
                raise InputError(path, "its frames form no volume", _REMEDY)
            labels = np.zeros(grid.spatial_shape, np.uint8)
            for label in _TYPES:  # in ascending order of precedence
                for mask in _masks(found, [number for number, meaning in meanings.items() if meaning == label]):
                    labels[mask] = label
    except InputError:
        raise
    except Exception as error:  # pydicom and highdicom raise many types, and their messages may quote patient data
        raise InputError(path, f"not a readable DICOM segmentation ({type(error).__name__})", _REMEDY) from error
    if not set(meanings.values()) & set(CLASSES.values()):
        raise InputError(path, "no segment is coded as kidney, neoplasm, mass or cyst", "Give another segmentation")
    affine = np.diag([-1.0, -1, 1, 1]) @ np.asarray(grid.affine, np.float64)  # from LPS to RAS+
    check_affine(path, affine)
    unread = sum(_is_of_kidney(one) and meanings[int(one.SegmentNumber)] is None for one in found.SegmentSequence)
    native = Geometry(triple(grid.spatial_shape), affine, doubts=(_UNREAD.format(unread),) if unread else ())
    return Volume(np.ascontiguousarray(turn_to_canonical(labels, native)), canonical_geometry(native), native, case_id)


def _meaning(segment: Any) -> int | None:
    """The class of a segment by its codes; None: of something else, such as a tumor of another organ."""
    kind = _code(segment.SegmentedPropertyTypeCodeSequence[0])
    if segment.get("AnatomicRegionSequence") and not _is_of_kidney(segment):
        return None
    return next((label for label, kinds in _TYPES.items() if any(kind == one for one in kinds)), None)


def _is_of_kidney(segment: Any) -> bool:
    """Whether a segment states a kidney as its region."""
    region = [_code(item) for item in segment.get("AnatomicRegionSequence", [])]
    return any(one == organ for one in region for organ in _TYPES[KIDNEY])


def _code(item: Any) -> Code:
    return Code(str(item.CodeValue), str(item.CodingSchemeDesignator), str(item.get("CodeMeaning", "")))


def _masks(found: Any, segments: list[int]) -> Iterator[NDArray[np.bool_]]:
    """The masks of segments, together where they are binary, of which half and more counts where they are not."""
    if found.SegmentationType == "FRACTIONAL":
        for one in segments:
            yield found.get_volume(segment_numbers=[one]).array[..., 0] >= 0.5
    elif segments:
        yield found.get_volume(segment_numbers=segments, combine_segments=True, skip_overlap_checks=True).array > 0
