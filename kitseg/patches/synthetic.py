"""Synthetic patients as training patches, each a function of (seed, epoch, index), and as whole cases on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchio as tio
from torch import Tensor
from torch.utils.data import Dataset

from kitseg.errors import UsageError
from kitseg.labels import CYST, KIDNEY
from kitseg.links.input_transform import InputTransform
from kitseg.patches.bodies import open_body, open_shapes
from kitseg.patches.queue import Address
from kitseg.synthesis.bodies import RealBody
from kitseg.synthesis.patient import SynthesisParts, SyntheticPatient, View, make
from kitseg.synthesis.shapes import Shapes
from kitseg.types import Geometry
from kitseg.volumes.kits import IMAGE, LABEL
from kitseg.volumes.nifti import SYNTHETIC_MARK, write_image, write_labels
from kitseg.volumes.store import open_case

LESION_STAGE, KIDNEY_STAGE = (0.6, 0.55, 0.45), (0.5, 0.35, 0.65)  # see ``View.focus``
LARGEST = 50.0  # mm, the radius of a lesion


@dataclass(frozen=True)
class SyntheticSource:
    """What the patients of a training are made from.

    bodies: folders of stored cases with prepared bodies; shapes: folder of shapes, None for drawn ones; label_maps:
    those whose shapes are used; spacing: of the patches, mm; patients: per epoch; everywhere: patches of the whole
    body, not only around the kidneys; cysts: whether they have a label of their own, or are kidney; without: parts
    that are switched off.
    """

    bodies: tuple[Path, ...]
    shapes: Path | None
    label_maps: tuple[str, ...]
    spacing: tuple[float, float, float]
    patients: int
    everywhere: bool
    cysts: bool
    without: tuple[str, ...] = ()


class SyntheticQueue(Dataset[tio.Subject]):
    """Patches of synthetic patients, looked up by (epoch, index): the same for any number of workers and ranks.

    Args:
        source: what they are made from. size: voxels of a patch.
        transform: makes the network's input. seed: random seed.
    """

    def __init__(self, source: SyntheticSource, size: Iterable[int], transform: InputTransform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        depth, height, width = map(int, size)
        least = max(2.5, 2 * float(np.mean(source.spacing)))
        self.view = View(
            (depth, height, width),
            source.spacing,
            KIDNEY_STAGE if source.everywhere else LESION_STAGE,
            source.everywhere,
            (least, LARGEST),
        )
        self.parts = parts_without(source.without)

    @cached_property
    def bodies(self) -> list[tuple[RealBody, tuple[float, float]]]:
        """The bodies, and mean and standard deviation of each scan's HU; opened in each process."""
        return [(open_body(folder), open_case(folder).statistics) for folder in self.source.bodies]

    @cached_property
    def shapes(self) -> Shapes:
        """The lesions' shapes."""
        source = self.source
        return Shapes() if source.shapes is None else open_shapes(source.shapes, source.label_maps)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is memory-mapped, which a loader process opens itself."""
        return {name: value for name, value in vars(self).items() if name not in ("bodies", "shapes")}

    def __len__(self) -> int:
        """Patients per epoch."""
        return self.source.patients

    def __getitem__(self, address: Address) -> tio.Subject:
        """The patch at (epoch, index): ``image``, the network's input, and ``label``."""
        rng = np.random.default_rng((self.seed, *address))
        body, statistics = self.bodies[int(rng.integers(len(self.bodies)))]
        patient = make(body, self.shapes, self.view, self.parts, rng, [one for one, _ in self.bodies])
        label = patient.label if self.source.cysts else _without_cysts(patient.label)
        image = self.transform(patient.hu[None], statistics, None)
        return tio.Subject(
            image=tio.ScalarImage(tensor=image), label=tio.LabelMap(tensor=label[None]), case=f"synthetic {body.name}"
        )


def parts_without(names: Sequence[str]) -> SynthesisParts:
    """All parts but those named. Raises UsageError: an unknown part."""
    known = asdict(SynthesisParts())
    if odd := [name for name in names if name not in known]:
        raise UsageError(f"there is no part '{odd[0]}' of the synthesis. Choose from {', '.join(known)}")
    return SynthesisParts(**{name: name not in names for name in known})


def write_patient(folder: Path, patient: SyntheticPatient, native: Geometry, cysts: bool = True) -> None:
    """Write a patient in the KiTS layout into an existing folder, with kits23 labels on a body's own grid.

    cysts: whether they have a label of their own, or are kidney.
    """
    hu, label = patient.hu.round().clamp(-1024, 3071).to(torch.int16), patient.label
    write_image(folder / IMAGE, hu.numpy(), native, SYNTHETIC_MARK)
    write_labels(folder / LABEL, (label if cysts else _without_cysts(label)).numpy(), native, SYNTHETIC_MARK)


def _without_cysts(label: Tensor) -> Tensor:
    return label.masked_fill(label == CYST, KIDNEY)
