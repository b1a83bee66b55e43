"""DICOM output: labels as a DICOM segmentation object on the voxels of the source series."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.sr.codedict import codes

from kitseg.labels import KITS23, Scheme
from kitseg.measurement.findings import RIGHT, Findings
from kitseg.measurement.parts import LabelPart, find_parts
from kitseg.runtime.files import atomic_write
from kitseg.volumes.dicom.headers import made_up_uid, quiet
from kitseg.volumes.dicom.series import Series, pseudonym, stack_of
from kitseg.volumes.dicom.source import series_number, source_images
from kitseg.volumes.nifti import canonical_geometry, turn_to_canonical, turn_to_native

#: Written into every DICOM file of kitseg; at most 64 characters.
NOTICE = "For research use only. kitseg is not a medical device."
NOTHING = (LabelPart("kidney"), LabelPart("tumor"))  # the segments where nothing was found

_codes: Any = codes
KINDS = {"kidney": _codes.SCT.Kidney, "tumor": _codes.SCT.Neoplasm, "cyst": _codes.SCT.Cyst}


@dataclass(frozen=True)
class Algorithm:
    """Name and version of the model that predicted the labels."""

    name: str
    version: str


@dataclass(frozen=True)
class SegmentedSeries:
    """The labels of a DICOM series, as DICOM files state them.

    labels: (D, H, W) in orientation (I, P, L) with kitseg's ids; findings: of these labels, with ``hu``; hu: the CT;
    scheme: names and colours; anonymous: without patient and study, but for the UIDs that files refer to; remarks: what
    makes the labels doubtful, of nobody.
    """

    series: Series
    labels: NDArray[np.uint8]
    findings: Findings
    algorithm: Algorithm
    hu: NDArray[Any] | None = None
    scheme: Scheme = KITS23
    anonymous: bool = False
    remarks: tuple[str, ...] = ()

    @cached_property
    def parts(self) -> tuple[NDArray[np.uint16], list[LabelPart]]:
        """The number of each voxel's segment (D, H, W), and the segments."""
        geometry = canonical_geometry(stack_of(self.series).native)
        return find_parts(self.labels, geometry, self.findings, self.hu)

    @cached_property
    def frames(self) -> NDArray[Any]:
        """The number of each pixel's segment in the slices of the series (N, rows, columns)."""
        stack, (numbers, parts) = stack_of(self.series), self.parts
        planes = turn_to_native(numbers, stack.native).transpose(2, 1, 0)
        return np.ascontiguousarray(planes[list(stack.slots)], np.min_scalar_type(len(parts)))

    @property
    def image_numbers(self) -> tuple[str, ...]:
        """The InstanceNumber of each slice from the head downwards, empty where there is none; of axial slices only."""
        stack = stack_of(self.series)
        slots = np.broadcast_to(np.arange(stack.native.shape[2]), stack.native.shape)
        slots = turn_to_canonical(slots, stack.native)[:, 0, 0]
        numbers = {slot: header.number for slot, header in zip(stack.slots, stack.headers, strict=True)}
        return tuple(numbers.get(int(slot), "") for slot in slots) if slots[0] != slots[-1] else ()

    def name(self, part: LabelPart) -> str:
        """The name of a segment, such as ``Tumor 1, right kidney``."""
        own = self.scheme.names.get(part.kind, part.kind)
        if part.found is None:
            return own.capitalize() if part in NOTHING and not self.labels.any() else f"{own.capitalize()}, smallest"
        if part.kind == "kidney":
            return f"{part.found.side.capitalize()} {own}"
        return f"{own.capitalize()} {part.number}, {part.found.side} {self.scheme.kidney.name}"

    @property
    def title(self) -> str:
        """What was segmented, as a description of a series."""
        kinds = {part.kind for part in self.parts[1]} | {"kidney", "tumor"}
        return f"kitseg {', '.join(kind for kind in KINDS if kind in kinds)}, research use"


def write_segmentation(path: Path, found: SegmentedSeries) -> None:
    """Write the labels of a series as a binary DICOM SEG, atomically: a segment for each kidney and lesion.

    Frames without labels are omitted, except where nothing was found: then the segments kidney and tumor are empty.

    Raises:
        InputError: the series forms no volume, or a header can no longer be read.
    """
    with atomic_write(path) as partial, quiet():
        segmentation = Segmentation(
            source_images=source_images(found.series, found.anonymous),
            pixel_array=found.frames,
            segmentation_type="BINARY",
            segment_descriptions=[
                _segment(number, part, found) for number, part in enumerate(found.parts[1] or NOTHING, start=1)
            ],
            series_number=series_number(found.series, 0),
            content_description=NOTICE,
            content_label="KIDNEY_TUMOR",
            content_creator_name="kitseg^software",
            series_description=found.title,
            omit_empty_frames=bool(found.frames.any()),
            **equipment(found.algorithm),
        )
        segmentation.save_as(partial)


def equipment(algorithm: Algorithm) -> dict[str, Any]:
    """What made a DICOM file, and its new UIDs, as highdicom takes them."""
    return {
        "series_instance_uid": highdicom.UID(),
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": "kitseg",
        "manufacturer_model_name": algorithm.name[:64],
        "software_versions": algorithm.version[:64],
        "device_serial_number": "none",
    }


def laterality(side: str) -> Any:
    """The code of a side."""
    return CodedConcept.from_code(_codes.SCT.Right if side == RIGHT else _codes.SCT.Left)


def _segment(number: int, part: LabelPart, found: SegmentedSeries) -> SegmentDescription:
    sct, kidney, name = _codes.SCT, part.kind == "kidney", found.name(part)
    colour = found.scheme.colours.get(part.kind) or KITS23.colours[part.kind]
    segment = SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=sct.AnatomicalStructure if kidney else sct.MorphologicallyAbnormalStructure,
        segmented_property_type=KINDS[part.kind],
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=found.algorithm.name, family=_codes.DCM.ArtificialIntelligence, version=found.algorithm.version
        ),
        tracking_id=tracking(name, found)[0],
        tracking_uid=tracking(name, found)[1],
        anatomic_regions=None if kidney else [sct.Kidney],
        display_color=CIELabColor.from_rgb(*bytes.fromhex(colour[1:])),
    )
    if part.found is not None:
        place = segment.SegmentedPropertyTypeCodeSequence if kidney else segment.AnatomicRegionSequence
        modifier = "SegmentedPropertyTypeModifierCodeSequence" if kidney else "AnatomicRegionModifierSequence"
        setattr(place[0], modifier, [laterality(part.found.side)])
    return segment


def tracking(name: str, found: SegmentedSeries) -> tuple[str, str]:
    """The tracking identifier and UID of a segment, the same whenever the series is predicted again."""
    series = found.series
    return f"{pseudonym('series', series.uid)} {name}"[:64], made_up_uid("tracking", series.study, series.uid, name)
